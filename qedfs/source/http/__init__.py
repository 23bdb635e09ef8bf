"""The HTTP source: reads ranges of a file at an http or https URL, with libcurl.

`client.py` implements `Source`. `judge.py` validates every answer before a byte of it is used.
"""

from qedfs.source.http.client import HttpSource

__all__ = ["HttpSource"]
