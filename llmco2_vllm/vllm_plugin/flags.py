"""Flags and settings: from the command line, ``additional_config`` or environment to the engine configuration."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from llmco2_vllm.vllm_plugin import compat
from llmco2_vllm.vllm_plugin.compat import ATTRIBUTE

logger = logging.getLogger("vllm.llmco2")

MIDDLEWARE = "llmco2_vllm.vllm_plugin.middleware.CarbonMiddleware"


def install() -> None:
    """Wrap the host's argument and configuration classes, once per process."""
    compat.wrap("add_cli_args", _add_cli_args)
    compat.wrap("from_cli_args", _from_cli_args)
    compat.wrap("create_engine_config", _create_engine_config)
    compat.wrap("get_scheduler_cls", _get_scheduler_cls)


def requested(
    flag: bool, flag_values: Sequence[object] | None, additional_config: object, environ: Mapping[str, str]
) -> Any:
    """The Settings if anything asks for the meter, else None. Raises ConfigError.

    ``--carbon-config`` implies ``--carbon`` and may come several times, the last one winning; the flag
    wins over ``additional_config``, that over the environment.
    """
    from llmco2_vllm import config

    asked = additional_config.get("carbon") if isinstance(additional_config, Mapping) else None
    flagged = flag or flag_values is not None
    if not flagged and (asked is False or (asked is None and not config.enabled_by_environment(environ))):
        return None
    from llmco2_vllm.assemble import check_settings

    settings = config.build_settings(
        ("environment", config.environment_settings(environ)),
        ('additional_config["carbon"]', config.parse_settings(asked or None, 'additional_config["carbon"]')),
        *(("--carbon-config", config.parse_settings(item, "--carbon-config")) for item in flag_values or ()),
    )
    check_settings(settings)
    return settings


def _add_cli_args(original: Callable[..., Any]) -> Callable[..., Any]:
    def add_cli_args(parser: Any, *args: Any, **kwargs: Any) -> Any:
        parser = original(parser, *args, **kwargs)
        group = parser.add_argument_group(
            title="Carbon", description="Energy and carbon of every request (plugin llmco2_vllm)."
        )
        group.add_argument(
            "--carbon",
            action="store_true",
            default=False,
            help="Predict the energy and carbon of every batch and report them in each response and in /metrics.",
        )
        # Appended, not replaced: the host turns dotted flags into one more JSON after the one that was typed.
        group.add_argument("--carbon-config", action="append", default=None, metavar="JSON", help=_config_help())
        return parser

    return add_cli_args


def _config_help() -> str:
    from llmco2_vllm.config import Settings

    keys = "\n".join(f"- {name}: {field.description}" for name, field in Settings.model_fields.items())
    return (
        "Settings of the carbon meter; implies --carbon. A JSON object, or one flag per key: "
        "--carbon-config.zone FR. Keys:\n" + keys
    ).replace("%", "%%")


def _from_cli_args(original: Callable[..., Any]) -> Callable[..., Any]:
    def from_cli_args(cls: Any, args: Any, *rest: Any, **kwargs: Any) -> Any:
        from llmco2_vllm.config import ConfigError

        engine_args = original(cls, args, *rest, **kwargs)
        try:
            settings = requested(
                bool(getattr(args, "carbon", False)),
                getattr(args, "carbon_config", None),
                getattr(engine_args, "additional_config", None),
                os.environ,
            )
        except ConfigError as error:
            raise SystemExit(f"vllm: error: {error}") from None
        if settings is not None:
            setattr(engine_args, ATTRIBUTE, settings)
            # Further API servers are spawned with these arguments and meet our wrappers only after parsing them.
            additional = getattr(args, "additional_config", None) or {}
            args.additional_config = {**additional, "carbon": settings.model_dump(exclude_unset=True)}
            middleware = getattr(args, "middleware", None)
            if isinstance(middleware, list) and MIDDLEWARE not in middleware:
                # First is innermost: an operator's own authentication stays in front of our endpoints. A new
                # list: the parser's default would be shared by every Namespace.
                args.middleware = [MIDDLEWARE, *middleware]
        return engine_args

    return from_cli_args


def _create_engine_config(original: Callable[..., Any]) -> Callable[..., Any]:
    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        additional = getattr(self, "additional_config", None)
        settings = getattr(self, ATTRIBUTE, None) or requested(False, None, additional, os.environ)
        if isinstance(additional, Mapping) and "carbon" in additional:
            # Left in, it would change the compile cache's key and cost a recompilation.
            self.additional_config = {key: value for key, value in additional.items() if key != "carbon"}
        vllm_config = original(self, *args, **kwargs)
        if settings is not None:
            setattr(self, ATTRIBUTE, settings)
            _enable(vllm_config, settings)
        return vllm_config

    return create_engine_config


def _enable(vllm_config: Any, settings: Any) -> None:
    from llmco2_vllm.vllm_plugin import output_path

    try:
        # Plain attributes: they survive pickling and are no part of any hash.
        setattr(vllm_config, ATTRIBUTE, settings)
        setattr(vllm_config.scheduler_config, ATTRIBUTE, settings)
        output_path.enable(settings, vllm_config)
    except Exception as error:
        _not_enabled(error)


def _not_enabled(error: Exception) -> None:
    logger.error("llmco2: not enabled (%s: %s); serving goes on", type(error).__name__, error)


def _get_scheduler_cls(original: Callable[..., Any]) -> Callable[..., Any]:
    def get_scheduler_cls(self: Any, *args: Any, **kwargs: Any) -> Any:
        base = original(self, *args, **kwargs)
        if getattr(self, ATTRIBUTE, None) is None:
            return base
        try:
            from llmco2_vllm.vllm_plugin.scheduler import with_carbon

            return with_carbon(base)
        except Exception as error:
            _not_enabled(error)
            return base

    return get_scheduler_cls
