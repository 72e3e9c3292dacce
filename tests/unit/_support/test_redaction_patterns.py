"""Secrets that are found by their form, and ordinary output that is left as it is."""

from __future__ import annotations

import time

import pytest

from prefect_mlprojects._support.redaction import holds_secret, is_secret, mark_variable, redact, redact_url
from prefect_mlprojects._support.secrets import Secret, Withheld

JWT = "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.c2lnbmF0dXJl"


@pytest.mark.parametrize(
    ("text", "secret"),
    [
        # Passwords that SQLAlchemy takes as they are.
        *(
            (f"postgresql://me:{each}@db/mlflow", each)
            for each in ("a/b", "a?b", "a#b", "a'b", 'a"b', "a<b", "a b c", "a@b")
        ),
        ("failed: mysql+pymysql://me:pa ss/w?d@db:3306/mlflow is down", "pa ss/w?d"),
        ("https://me:p/w?x@host/repo.git", "p/w?x"),
        ("mssql+pyodbc:///?odbc_connect=DRIVER%3DODBC%3BUID%3Dsa%3BPWD%3Dhunter2%21%3BSERVER%3Dh", "hunter2%21"),
        ("mssql+pyodbc:///?odbc_connect=PWD%3D%7Ba%3Bb%7D%3BSERVER%3Dh", "a%3Bb"),
        ("DRIVER=ODBC;UID=sa;PWD=hunter2;SERVER=h", "hunter2"),
        ("DefaultEndpointsProtocol=https;AccountName=a;AccountKey=c2VjcmV0a2V5==;EndpointSuffix=x", "c2VjcmV0a2V5=="),
        ("Endpoint=sb://x/;SharedAccessKeyName=n;SharedAccessKey=c2VjcmV0", "c2VjcmV0"),
        ("GET /x\r\nAuthorization: Bearer abc.def", "abc.def"),
        ("Authorization: Basic dXNlcjpwYXNz", "dXNlcjpwYXNz"),
        ("{'Authorization': 'Bearer opaque-thing'}", "opaque-thing"),
        ('{"authorization": "token 0123abcd"}', "0123abcd"),
        ("curl -H 'X-Api-Key: 12345secret'", "12345secret"),
        ("sent bearer abcdefghijklmnopqrstuvwxyz", "abcdefghijklmnopqrstuvwxyz"),
        *(
            (f"https://h/x?{name}=abc&y=1", "abc")
            for name in ("pass", "code", "jwt", "private_key", "bearer", "token", "sig")
        ),
        ("https://h/x?access%5Ftoken=abc", "abc"),
        ("https://h/x?a=1&client%5Fsecret=abc", "abc"),
        ("https://conda.example/t/my-token/channel", "my-token"),
        ("https://conda.example/t/tk-0f1e2d3c/main/linux-64", "tk-0f1e2d3c"),
        ("HTTPS_PROXY is ci:pr0xy@proxy.example:3128", "pr0xy"),
        ("could not connect to u:pw@10.0.0.1:5432", "pw"),
        ("DB_PASSWORD=hunter2 python train.py", "hunter2"),
        ("connect(user='ci', password='hunter 2')", "hunter 2"),
        (f"token is {JWT}.", JWT),
        ("cloning with ghp_0123456789abcdefghijABCDEFGHIJ0123", "ghp_0123456789abcdefghijABCDEFGHIJ0123"),
        ("-----BEGIN RSA PRIVATE KEY-----\nMIIBOwIBAAJB\n-----END RSA PRIVATE KEY-----", "MIIBOwIBAAJB"),
    ],
)
def test_redact_text_with_a_secret_hides_it(text: str, secret: str) -> None:
    shown = redact(text)

    assert secret not in shown.replace("***", "")
    assert "***" in shown
    assert holds_secret(text)
    assert redact(shown) == shown


ORDINARY = """\
2026-11-27 10:00:01,234 INFO epoch 3/10: loss=0.1234 acc=0.98 lr=1e-4 token=512 max_tokens=4096
see https://discuss.pytorch.org/t/runtime-error-cuda-out-of-memory/1234 for more
Downloading https://files.pythonhosted.org/packages/a/b/torch-2.1.0.whl (600 MB)
http://localhost:5000/#/experiments/1/runs/0123456789abcdef0123456789abcdef
http://localhost:8080/path@v2/x and mail me@example.com
pulled docker.io/library/busybox:1.36@sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef
docker://busybox:1.36@sha256:0123456789abcdef
git@github.com:acme/churn.git
ssh://git@host/acme/churn.git
abfss://container@account.dfs.core.windows.net/data/train.parquet
s3://bucket/key?versionId=abc
mlflow-artifacts:/1/2/artifacts, file:///data/x:y@z
postgresql://db:5432/mlflow is ready
mongodb://h1:27017,h2:27017/mlflow
Basic usage: train.py --tokenizer bert --pad-token '<pad>' eos_token=</s>
basic configuration loaded; the bearer of this message; authorization: required
{"loss": 0.1, "time": "12:30:01", "user": "me@example.com", "url": "https://example.com/a?b=c"}
assert x == y; key=value; code=3; ?query
Traceback (most recent call last):
  File "/home/me/t/token/train.py", line 3, in <module>
    connect(user=user, password=None)
KeyError: 'password'
100%|##########| 938/938 [00:10<00:00, 92.3it/s]
a@b:c d:e@f 10:30@room:12 @decorator x:int=3
TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=4
sha256:0123456789abcdef0123456789abcdef commit 0123456789abcdef0123456789abcdef01234567
"""


def test_redact_ordinary_output_leaves_it_as_it_is() -> None:
    assert redact(ORDINARY) == ORDINARY
    for line in ORDINARY.splitlines():
        assert redact(line) == line


def test_redact_ordinary_lines_takes_less_than_a_tenth_of_a_millisecond_each() -> None:
    lines = ORDINARY.splitlines() * 100
    started = time.process_time()
    for line in lines:
        redact(line)
    assert (time.process_time() - started) / len(lines) < 1e-4


@pytest.mark.parametrize(
    "text", ["a" * 1_000_000, "://" * 300_000, "a:b@" * 250_000, "?a=" * 300_000, "http://u:" * 100_000]
)
def test_redact_long_hostile_text_takes_no_longer_than_its_length(text: str) -> None:
    started = time.process_time()
    redact(text)
    assert time.process_time() - started < 5


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("postgresql://me:p@h/x@db/mlflow", "postgresql://me:***@db/mlflow"),
        ("mysql://me:a b?c@db/mlflow", "mysql://me:***@db/mlflow"),
        ("http://localhost:5000/a@b", "http://localhost:5000/a@b"),
    ],
)
def test_redact_url_finds_a_password_that_longer_texts_hide(url: str, shown: str) -> None:
    assert redact_url(url) == shown


@pytest.mark.parametrize(
    ("name", "value", "kind"),
    [
        ("EPOCHS", "3", str),
        ("LR", "1e-4", str),
        ("MEMORY", "4Gi", str),
        ("DEBUG", "true", str),
        ("EMPTY", "", str),
        ("TOKENIZERS_PARALLELISM", "false", str),
        ("MAX_TOKENS", "4096", str),
        ("DB", "{{secrets/scope/key}}", str),
        ("DB", "{{ prefect.blocks.secret.db }}", str),
        ("STAGE", "prod", Withheld),
        ("DB", "hunter2", Withheld),
        ("DB_PASSWORD", "x", Secret),
        ("DB_PIN", "4711", Secret),
        ("API_TOKEN", "123456", Secret),
        ("STORE", "postgresql://u:pw@db/x", Secret),
        ("OPAQUE", "dapi0123456789abcdef01", Secret),
        ("HEADER", "Bearer abcdef123456", Secret),
    ],
)
def test_mark_variable_says_what_may_be_stored(name: str, value: str, kind: type) -> None:
    assert type(mark_variable(name, value)) is kind


def test_mark_variable_that_the_setting_names_is_public(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_MLPROJECTS_PUBLIC_VARIABLES", "MODEL_KEY, STAGE")

    assert mark_variable("MODEL_KEY", "resnet") == "resnet"
    assert mark_variable("STAGE", "prod") == "prod"
    assert not is_secret("MODEL_KEY", "resnet")
