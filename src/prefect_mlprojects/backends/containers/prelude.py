"""The shell script that runs a project's command line in a container: its first process, which passes signals on."""

from __future__ import annotations

STOP_WHILE_PREPARING = "trap 'exit 143' TERM INT QUIT HUP\n"
"""Ends a script of the container's first process on a signal; without a trap, the kernel ignores it there (signal(7))."""

# The command is a child, so that a program without a handler ends at once, and the kernel's rules for PID 1 don't apply to it.
# The whole process group gets a signal, as the shell of `a && b` ends before the program that it waits for. The script then
# waits until that has ended too, because the end of PID 1 kills it. Docker's init (tini) signals the group by itself.
RUN_BY_SHELL = """\
if command -v bash >/dev/null 2>&1; then shell=bash; else shell=sh; fi
stopping=
pass_on() {
  trap '' TERM INT QUIT HUP
  stopping=yes
  if [ $$ = 1 ] || [ -z "${TINI_KILL_PROCESS_GROUP:-}" ]; then kill -TERM 0; fi
}
fields() { read -r line <"/proc/$1/stat" && set -- ${line##*) } && echo "$1 $3"; }
others() {
  own=$(fields $$) || return 1
  for entry in /proc/[0-9]*; do
    [ "${entry#/proc/}" = $$ ] && continue
    found=$(fields "${entry#/proc/}") || continue
    [ "${found#* }" = "${own#* }" ] && [ "${found% *}" != Z ] && return 0
  done
  return 1
}
"$shell" -c "$1" <&0 &
command=$!
exec 2>/dev/null
trap pass_on TERM INT QUIT HUP
while :; do
  wait "$command"
  code=$?
  kill -0 "$command" || break
done
while [ -n "$stopping" ] && others; do sleep 0.1 || sleep 1; done
exit $code
"""
"""A script for ``sh``: runs the command line in ``$1`` with bash if the image has it, as on this machine, else with sh.

Its exit code is the command's. A stop signal reaches every process of the command as SIGTERM, since a shell's background
processes ignore SIGINT (POSIX, 2.11).
"""


def shell_command(command: str) -> list[str]:
    """Returns the container's command for a shell command line, which stays one argument."""
    return ["sh", "-c", RUN_BY_SHELL, "sh", command]
