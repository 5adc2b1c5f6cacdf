"""Tests of service.settings."""

import argparse
from pathlib import Path

import pytest

from service.errors import StartError
from service.settings import Settings, _cgroup_quota, add_flags, count_cores, load_settings, variable


def test_flag_wins_over_environment_and_environment_over_default() -> None:
    """CLI > environment > default, for each setting by itself."""
    environment = {"SERVICE_WORKERS": "3", "SERVICE_QUEUE_SIZE": "7"}
    settings = load_settings({"workers": "5", "queue_size": None}, environment)
    assert (settings.workers, settings.queue_size, settings.max_batch_size) == (5, 7, Settings().max_batch_size)


@pytest.mark.parametrize(
    ("flags", "environment", "port"),
    [
        ({}, {}, 8000),
        ({}, {"PORT": "9001"}, 9001),
        ({}, {"PORT": "9001", "SERVICE_PORT": "9002"}, 9002),
        ({"port": "9003"}, {"PORT": "9001", "SERVICE_PORT": "9002"}, 9003),
    ],
)
def test_port_is_honoured(flags: dict[str, str], environment: dict[str, str], port: int) -> None:
    """PORT, as hosting platforms set it, gives way to SERVICE_PORT and to --port."""
    assert load_settings(flags, environment).port == port


@pytest.mark.parametrize(
    ("flags", "environment", "start"),
    [
        ({"port": "70000"}, {}, "--port='70000': "),
        ({"port": "no"}, {}, "--port='no': "),
        ({}, {"PORT": ""}, "PORT='': "),
        ({}, {"SERVICE_WORKERS": "-1"}, "SERVICE_WORKERS='-1': "),
        ({"workers": "2"}, {"SERVICE_REQUEST_TIMEOUT": "0"}, "SERVICE_REQUEST_TIMEOUT='0': "),
        ({"request_timeout": "nan"}, {}, "--request-timeout='nan': "),
        ({"device": "tpu"}, {}, "--device='tpu': "),
        ({"device": "cuda:"}, {}, "--device='cuda:': "),
        ({"backend": "pickle"}, {}, "--backend='pickle': "),
        ({"max_batch_size": "1.5"}, {}, "--max-batch-size='1.5': "),
        ({"log_format": "xml"}, {}, "--log-format='xml': "),
        ({"api_key": ","}, {}, "--api-key=',': this key is blank"),
        ({"admin_key": " "}, {}, "--admin-key=' ': this key is blank"),
        ({"api_key": "caller"}, {"SERVICE_ADMIN_KEY": "\n"}, "SERVICE_ADMIN_KEY='\\n': this key is blank"),
    ],
)
def test_bad_value_is_one_line_that_names_its_origin(
    flags: dict[str, str], environment: dict[str, str], start: str
) -> None:
    """A value that cannot be used is refused with one line: where it came from, what it was, and why not."""
    with pytest.raises(StartError) as caught:
        load_settings(flags, environment)
    assert str(caught.value).startswith(start)
    assert len(str(caught.value)) > len(start)
    assert "\n" not in str(caught.value)


def test_every_setting_has_a_flag_that_sets_it() -> None:
    """`add_flags` makes one flag a setting, whose help names default and environment variable."""
    parser = argparse.ArgumentParser()
    add_flags(parser)
    text = " ".join(parser.format_help().split())
    for name in Settings.model_fields:
        assert f"--{name.replace('_', '-')} " in text
        assert f"environment: {variable(name)})" in text.replace("SERVICE_ ", "SERVICE_")
    flags = vars(parser.parse_args(["--models-dir", "a", "--request-timeout", "2.5"]))
    settings = load_settings(flags, {})
    assert (settings.models_dir, settings.request_timeout) == (Path("a"), 2.5)


def test_keys_are_not_shown() -> None:
    """Keys stay out of what is printed of the settings."""
    assert "secret" not in repr(Settings(api_key="secret", admin_key="secret"))


def test_keys_lose_what_surrounds_them() -> None:
    """The newline at the end of a file with a secret is not part of the key; an empty setting is no key."""
    settings = load_settings({"admin_key": " admin\n"}, {"SERVICE_API_KEY": "caller\n"})
    assert (settings.api_key, settings.admin_key) == ("caller", "admin")
    assert load_settings({"admin_key": ""}, {"SERVICE_API_KEY": ""}).api_key == ""


def test_settings_are_frozen() -> None:
    """A change is a restart."""
    with pytest.raises(ValueError, match="frozen"):
        Settings().port = 1


def test_count_cores_is_at_least_one() -> None:
    """There is a core to run on, and no more than the machine has."""
    assert count_cores() >= 1


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({"cpu.max": "150000 100000\n"}, 2),
        ({"cpu.max": "max 100000\n"}, 2**16),
        ({"cpu/cpu.cfs_quota_us": "100000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 1),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 2**16),
        ({}, 2**16),
    ],
)
def test_quota_of_a_container_is_seen(tmp_path: Path, files: dict[str, str], cores: int) -> None:
    """Both versions of control groups; no quota is no limit."""
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert _cgroup_quota(tmp_path) == cores
