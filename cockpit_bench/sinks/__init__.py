"""Where records go while a run goes on: the log, memory, the console, TensorBoard, or a function of the user's."""

from cockpit_bench.sinks.callback import CallbackSink
from cockpit_bench.sinks.console import ConsoleSink
from cockpit_bench.sinks.fanout import Fanout
from cockpit_bench.sinks.jsonl import JsonlSink
from cockpit_bench.sinks.memory import MemorySink
from cockpit_bench.sinks.sink import Sink
from cockpit_bench.sinks.tensorboard import TensorBoardSink

__all__ = ["CallbackSink", "ConsoleSink", "Fanout", "JsonlSink", "MemorySink", "Sink", "TensorBoardSink"]
