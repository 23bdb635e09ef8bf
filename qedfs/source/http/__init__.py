"""Backing images behind http and https URLs, read in ranges with libcurl.

`client.py` is the Source; every answer is judged in `judge.py` before a byte of it is used.
"""

from qedfs.source.http.client import HttpSource

__all__ = ["HttpSource"]
