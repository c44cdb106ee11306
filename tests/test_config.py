"""Settings are checked at birth, and flags are their fields."""

from __future__ import annotations

import argparse
import dataclasses

import pytest

from xllm.config import (
    CompileConfig,
    ConfigError,
    EngineConfig,
    ServerConfig,
    add_flags,
    from_args,
)


@pytest.mark.parametrize(("config", "values", "named"), [
    (CompileConfig, {"model": ""}, "--model"),
    (CompileConfig, {"model": "m", "backend": "gcc"}, "--backend is 'gcc'"),
    (CompileConfig, {"model": "m", "dtype": "float16"}, "--dtype"),
    (CompileConfig, {"model": "m", "max_tokens": 0}, "--max-tokens is 0"),
    (CompileConfig, {"model": "m", "max_tokens": 8, "max_sequences": 16}, "--max-sequences"),
    (CompileConfig, {"model": "m", "page_size": 7}, "--page-size is 7"),
    (EngineConfig, {"context_length": 1}, "--context-length is 1"),
    (EngineConfig, {"kv_cache_gib": -1.0}, "--kv-cache-gib is -1.0"),
    (EngineConfig, {"kv_cache_gib": float("nan")}, "--kv-cache-gib is nan"),
    (ServerConfig, {"port": 70000}, "--port is 70000"),
])
def test_bad_values_are_named_with_what_is_accepted(
    config: type, values: dict[str, object], named: str
) -> None:
    with pytest.raises(ConfigError) as error:
        config(**values)
    assert named in str(error.value) and "accepted" in str(error.value)


def test_flags_come_from_fields_and_round_trip() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model")
    for config in (CompileConfig, EngineConfig, ServerConfig):
        add_flags(parser, config)
    args = parser.parse_args(["--model", "m", "--max-tokens", "128", "--kv-cache-gib", "0.5",
                              "--context-length", "64", "--port", "0", "--trust-remote-code"])
    assert from_args(args, CompileConfig) == CompileConfig(
        "m", max_tokens=128, trust_remote_code=True)
    assert from_args(args, EngineConfig) == EngineConfig(64, 0.5)
    assert from_args(args, ServerConfig) == ServerConfig(port=0)
    for config in (CompileConfig, EngineConfig, ServerConfig):
        for item in dataclasses.fields(config):
            assert "--" + item.name.replace("_", "-") in parser.format_help()
