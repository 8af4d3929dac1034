"""Files of other machines, read by ranges: ``hf://``, ``s3://``, ``https://`` and ``http://``.

patience.py      when to try again, and how long to wait first
web.py           one response over HTTP: redirects, ranges, stalls
hugging_face.py  what a hub says of a repository, through its own client
address.py       what an address is made of
ranges.py        ranges of a file, over as many responses as it takes
store.py         the same of object stores, through fsspec
path.py          a path that answers as one of a local file does

What lies at an address, and which file is which, is said by ``weightkit.checkpoint.remote``.
"""
