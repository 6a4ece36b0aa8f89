"""Connections: what the environment may say, and what is said when it may not."""

from pathlib import Path

import pytest

from service.contract.settings import Connections, SettingsError


def test_defaults_need_no_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    settings = Connections.from_environment({})
    assert settings.database_url == f"sqlite:///{tmp_path}/.catmerge/catmerge.db"
    assert settings.object_store == f"file://{tmp_path}/.catmerge/objects"
    assert settings.workspace == "s3://catmerge/"
    assert settings.buckets is None
    assert settings.file_roots == ()


def test_settings_survive_the_way_to_a_child() -> None:
    settings = Connections.from_environment(
        {
            "CATMERGE_OBJECT_STORE": "s3",
            "CATMERGE_S3_ENDPOINT": "http://127.0.0.1:9000",
            "CATMERGE_S3_ACCESS_KEY": "key",
            "CATMERGE_S3_SECRET_KEY": "very secret",
            "CATMERGE_BUCKETS": "models, data",
            "CATMERGE_FILE_ROOTS": "/data,/models",
            "CATMERGE_LEASE_SECONDS": "30",
            "CATMERGE_PART_ATTEMPTS": "",
        }
    )
    assert settings.buckets == ("models", "data")
    assert settings.file_roots == (Path("/data"), Path("/models"))
    assert settings.lease_seconds == 30
    assert settings.part_attempts == 3
    assert Connections.from_environment(settings.to_environment()) == settings
    assert "very secret" not in repr(settings)


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("CATMERGE_LEASE_SECONDS", "soon"),
        ("CATMERGE_HEARTBEAT_SECONDS", "40"),
        ("CATMERGE_OBJECT_STORE", "/folder"),
        ("CATMERGE_WORKSPACE", "s3://catmerge"),
        ("CATMERGE_WORKSPACE", "catmerge/"),
        ("CATMERGE_S3_ENDPOINT", "localhost:9000"),
        ("CATMERGE_S3_SECRET_KEY", "alone"),
        ("CATMERGE_FILE_ROOTS", "relative/folder"),
        ("CATMERGE_INPUT_CACHE", "/without/a/limit"),
        ("CATMERGE_INPUT_CACHE_BYTES", "1000"),
        ("CATMERGE_INPUT_CACHE_BYTES", "0"),
    ],
)
def test_a_bad_variable_is_named(variable: str, value: str) -> None:
    with pytest.raises(SettingsError, match=variable) as caught:
        Connections.from_environment({variable: value})
    assert "alone" not in str(caught.value)


def test_no_bucket_at_all_is_not_any_bucket() -> None:
    settings = Connections(buckets=())
    assert Connections.from_environment(settings.to_environment()) == settings


def test_inputs_are_kept_in_a_folder_with_a_limit() -> None:
    environ = {"CATMERGE_INPUT_CACHE": "/var/cache", "CATMERGE_INPUT_CACHE_BYTES": "1000"}
    settings = Connections.from_environment(environ)
    assert (settings.input_cache, settings.input_cache_bytes) == (Path("/var/cache"), 1000)
    assert Connections.from_environment(settings.to_environment()) == settings
    with pytest.raises(SettingsError, match="absolute path"):
        Connections.from_environment({**environ, "CATMERGE_INPUT_CACHE": "cache"})
