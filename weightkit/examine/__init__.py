"""What a checkpoint is, and whether it is whole: ``inspect`` and ``verify``. Both change nothing and import no torch.

survey.py      what lies at a path: layout, files, headers, index
declared.py    what the config declares, against what the files hold
tensors.py     tensors against the blueprint, scales against weights, ranks against each other
loaders.py     what loaders ask of config.json and its like that no tensor tells
rope.py        of that, the rotary embedding
sides.py       the JSON files beside the weights
code.py        Python that an auto_map names
tokenizer.py   vocabulary, special tokens, chat template
stream.py      files read once for all who want their bytes
checksums.py, values.py, gptq_values.py, replicas.py    those who do
verify.py      all of it, in one run and one report
inspect.py     parameters, bytes, layers, experts, legal degrees
"""

from weightkit.examine.inspect import Inspection, inspect
from weightkit.examine.report import Check, Report
from weightkit.examine.verify import verify

__all__ = ["Check", "Inspection", "Report", "inspect", "verify"]
