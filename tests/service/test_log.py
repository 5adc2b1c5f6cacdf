"""Tests of service.telemetry.log."""

import json
import logging
import os
import re
import sys

import pytest

from service.telemetry import log

logger = logging.getLogger("service")


def test_text_lines_are_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    """A text line has time, level, logger and message, on standard error."""
    log.configure("text")
    logger.info("serving %d models", 3)
    captured = capsys.readouterr()
    assert re.fullmatch(r"\d{4}-\d\d-\d\d [\d:,]+ INFO service: serving 3 models\n", captured.err)
    assert captured.out == ""


def test_json_lines_are_one_object_each(capsys: pytest.CaptureFixture[str]) -> None:
    """Every line is one JSON object, also of a message with line breaks and of an exception with a stack."""
    log.configure("json")
    logger.info('a "quoted"\nmessage')
    try:
        raise ValueError("odd")
    except ValueError:
        logger.exception("request %s failed", "id-1")
    first, second = (json.loads(line) for line in capsys.readouterr().err.splitlines())
    assert (first["level"], first["logger"], first["message"]) == ("info", "service", 'a "quoted"\nmessage')
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", first["time"])
    assert second["message"] == "request id-1 failed"
    assert second["exception"].endswith("ValueError: odd")


def test_no_text_can_forge_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    """Line breaks and control characters are escaped; lines of a traceback are indented, also those of its message."""
    log.configure("text")
    forged = "\n2026-01-01 00:00:00,000 ERROR service: forged\r\x1b[2K\x85\u2028grüße"
    logger.warning("%s holds a manifest", forged)
    try:
        raise ValueError(forged)
    except ValueError:
        logger.exception("request failed")
    first, second, *traceback = capsys.readouterr().err[:-1].split("\n")
    assert r": \n2026-01-01 00:00:00,000 ERROR service: forged\r\x1b[2K\x85\u2028grüße holds" in first
    assert second.endswith("ERROR service: request failed")
    assert all(line.startswith("  ") and line.isprintable() for line in traceback)
    assert any("forged" in line for line in traceback)


def test_other_libraries_are_heard_from_warnings_on(capsys: pytest.CaptureFixture[str]) -> None:
    """What others log as information is not shown; their warnings are."""
    log.configure("text")
    logging.getLogger("uvicorn").info("quiet")
    logging.getLogger("uvicorn").warning("loud")
    assert "quiet" not in (text := capsys.readouterr().err)
    assert "loud" in text


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_name_that_is_no_text_is_logged(log_format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file's name with bytes that are no text is written with escapes, and stops nobody."""
    reader, writer = os.pipe()
    with open(reader, "rb", buffering=0) as pipe, open(writer, "w") as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        log.configure(log_format)
        logger.error("grüße, %s", os.fsdecode(b"caf\xe9"))
        assert rb"caf\udce9" in pipe.read(2**16)


def test_reader_that_stalls_stops_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """When nobody reads the log any more lines are dropped, whole, and who logs goes on; later lines arrive."""
    reader, writer = os.pipe()
    with open(reader, "rb", buffering=0) as pipe, open(writer, "w") as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        log.configure("json")
        for _ in range(100):
            logger.error("x" * 4000)
        lines = pipe.read(2**20).splitlines()
        assert 10 <= len(lines) < 100
        assert {json.loads(line)["message"] for line in lines} == {"x" * 4000}
        logger.error("again")
        assert json.loads(pipe.read(2**20))["message"] == "again"
    logging.getLogger().handlers.clear()
