"""What goes where: URLs, credentials, proxies."""

from __future__ import annotations

import traceback

import pytest

from qedfs.errors import Refused, SourceError, UsageError
from qedfs.source.http.target import Target, choose_proxy, first_target, next_target, shown_proxy
from qedfs.source.policy import Policy
from qedfs.source.url import parse_location


def target(url: str, *headers: str, **environ: str) -> Target:
    return first_target(parse_location(url), headers, environ)


@pytest.mark.parametrize(
    ("url", "sent"),
    [
        ("http://host/a", "http://host:80/a"),
        ("HTTPS://Host:8443/a?b=c%20d#frag", "https://host:8443/a?b=c%20d"),
        ("http://user:pass@host", "http://host:80/"),
        ("http://[::1]:8080/x", "http://[::1]:8080/x"),
        ("http://host/a b/ü%2F?q=ä", "http://host:80/a%20b/%C3%BC%2F?q=%C3%A4"),
        ("http://host/../%2e%2e/a", "http://host:80/../%2e%2e/a"),
        ("http://host\\@other/", "http://other:80/"),
        ("http://bücher.example/", "http://xn--bcher-kva.example:80/"),
    ],
)
def test_the_url_that_is_sent(url: str, sent: str) -> None:
    assert target(url).url == sent


@pytest.mark.parametrize(
    "url", ["http://a\\b/", "http://a b/", "http://a$b/", "http://a%2fb/", "http://" + "a" * 70 + "ü/"]
)
def test_odd_host_names_are_refused(url: str) -> None:
    with pytest.raises(UsageError):
        target(url)


def test_user_and_password_are_decoded_and_kept_out_of_sight() -> None:
    made = target(
        "http://us%40er:canary%3A@host/?token=canary", "Authorization: canary", http_proxy="http://p:canary@p"
    )
    assert (made.user, made.password) == ("us@er", "canary:")
    assert "canary" not in repr(made)


@pytest.mark.parametrize("line", ["X", "X canary", ": canary", "X: a\r\nY: canary", "X: \u20ac canary", "X : canary"])
def test_garbled_header_lines_are_refused_without_their_value(line: str) -> None:
    with pytest.raises(UsageError, match="extra header 2 is not") as caught:
        target("http://host/", "X: y", line)
    assert "canary" not in str(caught.value)


@pytest.mark.parametrize(
    ("reference", "url", "credentials"),
    [
        ("/b", "http://host:80/b", True),
        ("b?x=1", "http://host:80/dir/b?x=1", True),
        ("http://host/b", "http://host:80/b", True),
        ("http://HOST:80/b#frag", "http://host:80/b", True),
        ("/\xc3\xbc?\xfc", "http://host:80/%C3%BC?%FC", True),
        ("//other/b", "http://other:80/b", False),
        ("http://host:8080/b", "http://host:8080/b", False),
        ("https://host/b", "https://host:443/b", False),
        ("http://sub.host/b", "http://sub.host:80/b", False),
    ],
)
def test_credentials_stay_with_their_origin(reference: str, url: str, credentials: bool) -> None:
    origin = target("http://user:canary@host/dir/a", "Authorization: canary")
    following = next_target(origin, origin, reference, "192.0.2.1", {})
    assert following.url == url
    assert following.redirected_from == "192.0.2.1"
    assert (following.user, following.password, following.headers) == (
        ("user", "canary", ("Authorization: canary",)) if credentials else (None, None, ())
    )


def test_credentials_do_not_come_along_from_a_place_in_between() -> None:
    origin = target("http://user:canary@host/a")
    between = next_target(origin, origin, "http://other/b", None, {})
    assert next_target(origin, between, "/c", None, {}).user is None
    assert next_target(origin, between, "http://host/c", None, {}).user == "user"


@pytest.mark.parametrize(
    "reference",
    ["http://:80/", "http://[/", "http://[user:canary@h]/", "javascript:canary", "http://h:99999999/", "http://a b/"],
)
def test_a_redirect_to_nonsense_is_an_error(reference: str) -> None:
    origin = target("http://host/a")
    with pytest.raises(SourceError, match="redirects to something") as caught:
        next_target(origin, origin, reference, None, {})
    assert "canary" not in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize(
    ("proxy", "shown"),
    [
        ("", ""),
        ("proxy:3128", "proxy:3128"),
        ("http://me:canary@proxy:3128/", "http://proxy:3128/"),
        ("me:canary@proxy:3128", "proxy:3128"),
        ("my_name:canary@proxy:3128", "proxy:3128"),
        ("1st:canary@proxy", "proxy"),
        ("me:can/ary@proxy:3128", "..."),
    ],
)
def test_a_proxy_is_shown_without_its_password(proxy: str, shown: str) -> None:
    assert shown_proxy(proxy) == shown


@pytest.mark.parametrize(
    ("url", "environ", "proxy"),
    [
        ("http://host/", {}, ""),
        ("http://host/", {"http_proxy": "http://p:1"}, "http://p:1"),
        ("http://host/", {"HTTP_PROXY": "http://p:1"}, ""),
        ("https://host/", {"http_proxy": "http://p:1"}, ""),
        ("https://host/", {"HTTPS_PROXY": "http://p:2"}, "http://p:2"),
        ("https://host/", {"ALL_PROXY": "http://p:3"}, "http://p:3"),
        ("http://host/", {"http_proxy": "http://p:1", "no_proxy": "*"}, ""),
        ("http://host/", {"http_proxy": "http://p:1", "no_proxy": "other, host"}, ""),
        ("http://a.host/", {"http_proxy": "http://p:1", "NO_PROXY": ".host"}, ""),
        ("http://ahost/", {"http_proxy": "http://p:1", "no_proxy": "host"}, "http://p:1"),
        ("http://10.1.2.3/", {"http_proxy": "http://p:1", "no_proxy": "10.0.0.0/8"}, ""),
        ("http://11.1.2.3/", {"http_proxy": "http://p:1", "no_proxy": "10.0.0.0/8"}, "http://p:1"),
    ],
)
def test_proxies_as_curl_chooses_them(url: str, environ: dict[str, str], proxy: str) -> None:
    assert choose_proxy(parse_location(url), environ) == proxy


@pytest.mark.parametrize(
    "host",
    [
        "169.254.169.254",
        "0xa9fea9fe",
        "2852039166",
        "0251.0376.0251.0376",
        "[fe80::1]",
        "[::ffff:169.254.169.254]",
        "169.254.169.254.",
        "2852039166.",
        "\uff11\uff16\uff19.254.169.254",
        "169\u3002254\uff0e169\uff61254",
        "169.254.169.254\u3002",
        "\uff10\uff58a9fea9fe",
        "\u2460\u2465\u2468.254.169.254",
    ],
)
@pytest.mark.parametrize("proxy", ["", "http://proxy:3128"])
def test_a_link_local_literal_is_refused_in_every_spelling(host: str, proxy: str) -> None:
    with pytest.raises(Refused):
        target(f"http://{host}/", http_proxy=proxy).check_literal(Policy())


def test_the_address_of_the_users_proxy_is_the_users_choice() -> None:
    origin = target("http://host/", http_proxy="http://169.254.1.1:3128")
    origin.check_address("169.254.1.1", Policy())
    with pytest.raises(Refused):
        target("http://host/").check_address("169.254.1.1", Policy())


@pytest.mark.parametrize(
    ("url", "server"),
    [
        ("http://host/", "host"),
        ("http://10.0.0.7/", "10.0.0.7"),
        ("http://0x0a000007/", "10.0.0.7"),
        ("http://1\uff10.0.0.7./", "10.0.0.7"),
    ],
)
def test_behind_a_proxy_the_redirecting_server_is_the_one_that_the_url_names(url: str, server: str) -> None:
    origin = target(url, http_proxy="http://proxy:3128")
    assert next_target(origin, origin, "http://other/", "192.0.2.1", {}).redirected_from == server


@pytest.mark.parametrize("environ", [{}, {"http_proxy": "http://proxy:3128"}])
def test_a_redirect_that_came_through_a_proxy_does_not_lead_inside(environ: dict[str, str]) -> None:
    """The proxy relays a public server, and `no_proxy` is what makes the next hop a direct one."""
    public = target("http://host/", http_proxy="http://proxy:3128")
    following = next_target(public, public, "http://10.0.0.7/", "192.168.0.1", environ)
    with pytest.raises(Refused, match="redirected from host to the private address"):
        following.check_literal(Policy())
    inner = target("http://192.168.9.9/", http_proxy="http://proxy:3128")
    next_target(inner, inner, "http://10.0.0.7/", "192.168.0.1", environ).check_literal(Policy())
    named = next_target(public, public, "http://other/", "192.168.0.1", {})
    with pytest.raises(Refused, match="redirected from host to the private address"):
        named.check_address("127.0.0.1", Policy())
