"""The commands of the command line, one file each: `add` says what a command takes, another function does it."""

from . import compare, consolidate, data, env, evaluate, export, inspect, presets, settings, train

COMMANDS = (
    train,
    compare,
    data,
    evaluate,
    inspect,
    export,
    consolidate,
    presets,
    settings,
    env,
)  # as the help lists them
