from __future__ import annotations

import pydantic
import pytest

from service.settings import Settings


def test_settings_have_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CATMERGE_SOMETHING_ELSE", "1")
    monkeypatch.setenv("CATMERGE_PORT", "")
    settings = Settings()
    assert (settings.host, settings.port, settings.max_body_bytes) == ("127.0.0.1", 8000, 1 << 20)
    assert settings.idempotency_seconds == 7 * 86400
    assert settings.job_retention_seconds is None


def test_settings_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CATMERGE_HOST", "0.0.0.0")
    monkeypatch.setenv("CATMERGE_PUBLIC_URL", "https://merge.example.org/")
    monkeypatch.setenv("CATMERGE_JOB_RETENTION_DAYS", "30")
    settings = Settings()
    assert (settings.host, settings.public_url) == ("0.0.0.0", "https://merge.example.org")
    assert settings.job_retention_seconds == 30 * 86400


@pytest.mark.parametrize(("name", "text"), [("PORT", "70000"), ("SWEEP_SECONDS", "0"), ("PUBLIC_URL", "example.org")])
def test_a_setting_that_makes_no_sense_is_refused(monkeypatch: pytest.MonkeyPatch, name: str, text: str) -> None:
    monkeypatch.setenv(f"CATMERGE_{name}", text)
    with pytest.raises(pydantic.ValidationError):
        Settings()
