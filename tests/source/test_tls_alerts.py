"""What an alert of a TLS server means to a user, and that nothing else of the library's text is passed on."""

from __future__ import annotations

import pytest

from qedfs.source.tls_alerts import explain_alert


@pytest.mark.parametrize(
    ("text", "words", "lasting"),
    [
        ("[SSL: TLSV13_ALERT_CERTIFICATE_REQUIRED] tlsv13 alert certificate required (_ssl.c:2580)", "wants a", True),
        ("error:0A000410:SSL routines::sslv3 alert handshake failure", "refuses the TLS handshake", False),
        ("[SSL: TLSV1_ALERT_UNKNOWN_CA] tlsv1 alert unknown ca", "does not accept our client certificate", True),
        ("sslv3 alert certificate expired", "certificate expired", True),
        ("tlsv1 alert protocol version", "speaks no version of TLS", True),
        ("ssl/tls alert bad record mac", "pre-shared key wrong", False),
    ],
)
def test_known_alerts(text: str, words: str, lasting: bool) -> None:
    said = explain_alert(text)
    assert said is not None
    assert words in said.words
    assert said.lasting is lasting


@pytest.mark.parametrize("text", ["", "certificate verify failed", "alert of something else", "alert http://secret@x"])
def test_what_is_no_known_alert(text: str) -> None:
    assert explain_alert(text) is None
