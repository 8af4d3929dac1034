"""Smoke tests: whether a checkpoint, or a server of one, gives sane answers, and where two checkpoints part."""

from weightkit.smoke.prompts import GENERAL, Prompt, check_answers, prompts_for
from weightkit.smoke.verdict import Check, Verdict

__all__ = ["GENERAL", "Check", "Prompt", "Verdict", "check_answers", "prompts_for"]
