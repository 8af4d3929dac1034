"""Serving engines: the command that starts one on a checkpoint, what it would refuse, and whether a server works."""

from weightkit.serving.client import Answer, Client
from weightkit.serving.endpoint import smoke_endpoint
from weightkit.serving.engines import ENGINES, Engine
from weightkit.serving.launch import Launch, command
from weightkit.serving.run import Ran, run

__all__ = ["ENGINES", "Answer", "Client", "Engine", "Launch", "Ran", "command", "run", "smoke_endpoint"]
