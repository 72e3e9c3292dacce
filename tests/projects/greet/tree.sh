# Starts a grandchild in a session of its own, and waits.
setsid sleep 987654 &
echo "grandchild $!"
sleep 600 &
wait
