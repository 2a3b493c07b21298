"""A server answers to its own names, to no strange web page, and to who knows the token."""

from __future__ import annotations

import logging

import pytest

requests = pytest.importorskip("requests", reason="needs the [dev] extra: pip install -e '.[dev]'")
pytest.importorskip("uvicorn", reason="needs the [serve] extra: pip install -e '.[serve]'")

from speaking import JSON  # noqa: E402
from starlette.datastructures import Headers  # noqa: E402

from stamo_dist.errors import RunError  # noqa: E402
from stamo_dist.serve.guard import Allowed  # noqa: E402
from stamo_dist.serve.wire import BadRequestError  # noqa: E402


def refused(allowed: Allowed, **headers: str) -> str | None:
    try:
        allowed.check(Headers({name.replace("_", "-"): value for name, value in headers.items()}))
    except BadRequestError as bad:
        return f"{bad.status} {bad.field}"
    return None


def test_names() -> None:
    here = Allowed.on("127.0.0.1")
    for host in ("127.0.0.1:8000", "localhost", "LOCALHOST:8000", "[::1]:8000"):
        assert refused(here, host=host) is None, host
    for host in ("evil.example", "evil.example:8000", "localhost.evil.example", "10.0.0.7", "", "[", "a@b:c"):
        assert refused(here, host=host) == "400 Host", host
    assert refused(here) == "400 Host"
    everywhere = Allowed.on("0.0.0.0", ["Robot.lab.example"])
    for host in ("10.0.0.7:8000", "[fe80::1]:8000", "robot.lab.example", "localhost"):
        assert refused(everywhere, host=host) is None, host
    assert refused(everywhere, host="evil.example") == "400 Host"
    one = Allowed.on("10.0.0.7")
    assert (refused(one, host="10.0.0.7:80"), refused(one, host="10.0.0.8:80")) == (None, "400 Host")


def test_web_pages() -> None:
    here = Allowed.on("127.0.0.1")
    assert refused(here, host="localhost", origin="http://localhost:3000") is None
    assert refused(here, host="localhost", origin="https://evil.example") == "403 Origin"
    assert refused(here, host="localhost", origin="null") == "403 Origin"


def test_tokens() -> None:
    asking = Allowed.on("127.0.0.1", token="s3cret")
    for given in ("Bearer s3cret", "bearer s3cret", "Api-Key s3cret", "Basic dXNlcjpzM2NyZXQ="):
        assert refused(asking, host="localhost", authorization=given) is None, given
    for given in ("", "Bearer", "Bearer s3cre", "Bearer s3crets", "Basic !", "Basic dXNlcjo=", "s3cret", "Bearer é"):
        assert refused(asking, host="localhost", authorization=given) == "401 Authorization", given
    assert refused(asking, host="localhost") == "401 Authorization"
    assert "s3cret" not in repr(asking)


@pytest.mark.parametrize("wrong", ["", " a", "a\n", "é"])
def test_a_token_that_no_header_can_hold(monkeypatch: pytest.MonkeyPatch, wrong: str) -> None:
    from stamo_dist.serve.command import token

    monkeypatch.setenv("STAMO_SERVE_TOKEN", wrong)
    with pytest.raises(RunError, match="STAMO_SERVE_TOKEN: must be printable ASCII"):
        token()


def test_over_http(regression, served, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]) -> None:
    from stamo_dist.models.policies import load_policy

    caplog.set_level(logging.DEBUG)
    url = served(load_policy(regression), allowed=Allowed.on("127.0.0.1", token="s3cret"))
    found = requests.get(f"{url}/health", timeout=30)
    assert (found.status_code, found.json()["field"]) == (401, "Authorization")
    assert found.headers["WWW-Authenticate"] == "Bearer"
    known = {"Authorization": "Bearer s3cret"}
    assert requests.get(f"{url}/health", headers=known, timeout=30).json()["status"] == "ok"
    assert requests.get(f"{url}/healthz", headers=known, timeout=30).text == "OK\n"
    rebound = requests.post(f"{url}/act", data="{}", headers={**known, **JSON, "Host": "evil.example"}, timeout=30)
    assert (rebound.status_code, rebound.json()["field"]) == (400, "Host")
    assert "s3cret" not in caplog.text + "".join(capfd.readouterr())


def test_a_run_of_another_stage(tmp_path, monkeypatch: pytest.MonkeyPatch, toy_policy) -> None:
    from toy import write_recipe
    from toy_policy import write_policy_recipe

    from stamo_dist.serve.command import check_stage

    with pytest.raises(RunError, match="is a StaMo tokenizer, which acts on nothing; give the folder of a policy"):
        check_stage(toy_policy / "tokenizer")
    recipe = write_policy_recipe(tmp_path / "r.yaml", toy_policy)
    (tmp_path / "run").mkdir()
    (tmp_path / "run/resolved.yaml").write_text(recipe.read_text())
    check_stage(tmp_path / "run")
    recipe = write_recipe(tmp_path / "t.yaml", toy_policy / "shards", toy_policy / "vae")
    (tmp_path / "run/resolved.yaml").write_text(recipe.read_text())
    with pytest.raises(RunError, match="run: its recipe trains the tokenizer stage; give the run folder of a policy"):
        check_stage(tmp_path / "run")
    check_stage(tmp_path / "nothing")
