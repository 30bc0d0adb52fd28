"The crawler against a real server that is unkind to it."

import gzip
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Thread

import pytest

from so8t.data import web
from so8t.flow import disk
from so8t.flow.config import Web
from so8t.flow.problem import Problem

BY = '<a rel="license" href="https://creativecommons.org/licenses/by/4.0/">CC BY</a>'
COOK = "<p>Boil two pounds of fruit with one of sugar, and stir until it sets.</p>"
TEXT = f"<article><h1>Jam</h1>{COOK * 3}</article>"
PRIVATE = ("http://10.0.0.1/", "http://169.254.169.254/latest/meta-data/", "http://[::ffff:127.0.0.1]:1/", "http://0/",
           "http://[fe80::1]/", "http://192.168.0.1:8080/admin", "http://[64:ff9b::7f00:1]/")


def page(inside="", head="", lang="en"):
    return f"<html lang={lang}><head>{head}<title>Jam</title></head><body>{TEXT}{inside}{BY}</body></html>".encode()


def links(*paths):
    return "".join(f'<a href="{path}">more</a>' for path in paths)


def to(place, status=302):
    return lambda it: it.answer(b"", status, location=place)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        site = self.server.site
        site.asked.append((self.path, dict(self.headers), time.monotonic()))
        found = site.pages.get(self.path, site.pages.get("*", 404))
        with suppress(ConnectionError):
            if callable(found):
                return found(self)
            self.answer(found) if isinstance(found, bytes) else self.answer(b"", found)

    def answer(self, body, status=200, **headers):
        self.send_response(status)
        for name, value in ({"content_type": "text/html", "content_length": len(body)} | headers).items():
            if value is not None:
                self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


class Site:
    "A server on loopback, its pages, and what it was asked for."

    def __init__(self):
        self.pages, self.asked, self.closing = {"/robots.txt": 404}, [], Event()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.site = self
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def paths(self):
        return [path for path, _, _ in self.asked]


@pytest.fixture
def sites():
    made = []

    def make(**pages):
        made.append(Site())
        made[-1].pages.update({"/" + name: found for name, found in pages.items()})
        return made[-1]

    yield make
    for site in made:
        site.closing.set()
        site.server.shutdown()
        site.server.server_close()


@pytest.fixture
def site(sites):
    return sites()


def read(folder, *seeds, licences=("CC-BY-4.0",), **settings):
    settings = Web(**{"user_agent_url": "https://example.org/bot", "delay": 0, "timeout": 5} | settings)
    return list(web.crawl(list(seeds), settings, folder, list(licences), loopback=True))


def why(folder):
    "Path -> reason, of the last round."
    last = next(it for it in reversed(web.rounds(folder)) if it)
    return {"/" + it["url"].split("/", 3)[3]: it["reason"] for it in last if "hops" in it}


def test_a_row_says_where_it_came_from(site, tmp_path):
    site.pages["/jam"] = page()
    [row] = read(tmp_path, f"{site.url}/jam#top")
    assert row["prompt"].startswith("Jam\nBoil two pounds") and row["verdict"] is None and row["labeller"] is None
    assert (row["url"], row["key"], row["source"]) == (f"{site.url}/jam", f"{site.url}/jam", "web:127.0.0.1")
    assert (row["licence"], row["lang"], len(row["collected"])) == ("CC-BY-4.0", "en", 10)
    said = site.asked[-1][1]
    assert said["User-Agent"].startswith("so8t/") and said["User-Agent"].endswith("(+https://example.org/bot)")
    assert said["Host"] == site.url.removeprefix("http://")


def test_redirects_are_followed_one_by_one(site, tmp_path):
    site.pages |= {"/": to("/one", 301), "/one": to("two", 307), "/two": to(f"{site.url}/jam", 308), "/jam": page()}
    [row] = read(tmp_path, site.url)
    assert row["url"] == f"{site.url}/jam"
    assert site.paths() == ["/robots.txt", "/", "/one", "/two", "/jam"]


def test_redirects_that_lead_nowhere(site, sites, tmp_path):
    other = sites(jam=page())
    ends = {"/self": to("/self"), "/a": to("/b"), "/b": to("/a"), "/mail": to("mailto:cook@example.org"),
            "/bare": lambda it: it.answer(b"", 302), "/file": to("file:///etc/passwd"), "/shut": to("/private/jam"),
            "/twice": to("/jam"), "/away": to(f"{other.url}/jam")}
    site.pages |= ends | {"/": page(links(*ends, "/jam", "/new0")), "/jam": page(),
                          "/robots.txt": b"User-agent: *\nDisallow: /private"}
    site.pages |= {f"/new{i}": to(f"/new{i + 1}") for i in range(50)}
    assert len(read(tmp_path, site.url)) == 2
    new, nowhere = "redirect to nowhere new", "redirect to nowhere"
    assert why(tmp_path) == {
        "/": None, "/self": new, "/a": new, "/b": new, "/mail": nowhere, "/bare": new, "/file": nowhere,
        "/shut": "robots.txt", "/twice": new, "/away": "redirect to another site", "/jam": None, "/new0": new}
    assert other.asked == [] and "/private/jam" not in site.paths()
    assert max(Counter(site.paths()).values()) <= 2


def test_no_page_leads_into_the_house(site, tmp_path, monkeypatch):
    connected, real = [], socket.socket.connect
    monkeypatch.setattr(socket.socket, "connect", lambda s, place: (connected.append(place[0]), real(s, place))[1])
    site.pages |= {f"/{i}": to(place) for i, place in enumerate(PRIVATE)}
    for name, seeds in {"sent": [f"{site.url}/{i}" for i in range(len(PRIVATE))], "linked": PRIVATE}.items():
        assert read(tmp_path / name, *seeds) == []
        assert web.tally(tmp_path / name) == {"robots.txt: private address": len(PRIVATE)}
    assert set(connected) <= {"127.0.0.1"}


def test_loopback_is_private_unless_asked_for(site, tmp_path):
    seeds = [site.url, site.url.replace("127.0.0.1", "localhost"), site.url.replace("127.0.0.1", "0x7f.1")]
    assert list(web.crawl(seeds, Web(user_agent_url="https://example.org/", delay=0), tmp_path, ["MIT"])) == []
    assert web.tally(tmp_path) == {"robots.txt: private address": 3} and site.asked == []


def test_a_name_that_changes_its_mind(site, tmp_path, monkeypatch):
    "DNS rebinding: what was checked is what is connected to, and the name is not asked for again."
    answers, real = [], socket.getaddrinfo

    def rebind(host, *args, **kwargs):
        if host != b"rebind.example":
            return real(host, *args, **kwargs)
        answers.append("127.0.0.1" if len(answers) % 2 == 0 else "10.0.0.1")
        return real(answers[-1], *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", rebind)
    site.pages["*"] = page()
    port = site.url.rpartition(":")[2]
    assert read(tmp_path, f"http://rebind.example:{port}/") == []
    assert site.paths() == ["/robots.txt"] and site.asked[0][1]["Host"] == f"rebind.example:{port}"
    assert answers == ["127.0.0.1", "10.0.0.1"] and why(tmp_path) == {"/": "private address"}


@pytest.mark.skipif(not shutil.which("openssl"), reason="makes its certificate with openssl")
def test_a_certificate_is_that_of_the_name(site, tmp_path, monkeypatch):
    "The connection goes to an address; what the server has to prove is the name."
    names, real = [], socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *args, **kwargs: real("127.0.0.1", *args, **kwargs))
    key, cert = tmp_path / "key.pem", tmp_path / "cert.pem"
    make = "openssl req -x509 -nodes -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -subj /CN=jam"
    names_of = ["-addext", "subjectAltName=DNS:jam.example", "-keyout", key, "-out", cert]
    subprocess.run([*make.split(), *names_of], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cert, key)
    context.sni_callback = lambda sock, name, _: names.append(name)
    site.server.socket = context.wrap_socket(site.server.socket, server_side=True)
    site.pages["/"] = page()
    port = site.url.rpartition(":")[2]
    unknown = "robots.txt: no answer (ConnectError)"
    assert read(tmp_path / "untrusted", f"https://jam.example:{port}/") == []
    assert why(tmp_path / "untrusted") == {"/": unknown}
    monkeypatch.setattr(web, "TLS", ssl.create_default_context(cafile=cert))
    [row] = read(tmp_path / "right", f"https://jam.example:{port}/")
    assert row["source"] == "web:jam.example" and set(names) == {"jam.example"}
    assert read(tmp_path / "wrong", f"https://jelly.example:{port}/") == []
    assert why(tmp_path / "wrong") == {"/": unknown}
    assert {headers["Host"] for _, headers, _ in site.asked} == {f"jam.example:{port}"}


def test_a_name_with_one_address_at_home_is_refused(monkeypatch, tmp_path):
    both = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (ip, 80)) for ip in ("93.184.216.34", "10.0.0.1")]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: both)
    assert read(tmp_path, "http://mixed.example/") == []
    assert web.tally(tmp_path) == {"robots.txt: private address": 1}


def test_large_slow_packed_and_endless_pages(site, tmp_path):
    sent = Counter()

    def endless(it):
        it.send_response(200)
        it.send_header("content-type", "text/html")
        it.end_headers()
        while not site.closing.is_set():
            sent["bytes"] += it.wfile.write(b"<p>jam" * 4000)

    def slow_head(it):
        it.wfile.write(b"HTTP/1.1 200 OK\r\n")
        while not site.closing.wait(0.02):
            it.wfile.write(b"X-Jam: 1\r\n")

    def slow_body(it):
        it.send_response(200)
        it.end_headers()
        while not site.closing.wait(0.02):
            it.wfile.write(b"x")

    bomb = gzip.compress(bytes(10**7))
    odd = {"/huge": lambda it: it.answer(b"", content_length=10**15), "/endless": endless, "/slow-head": slow_head,
           "/slow-body": slow_body, "/silent": lambda it: site.closing.wait(20),
           "/bomb": lambda it: it.answer(bomb, content_encoding="gzip"),
           "/cut": lambda it: (it.answer(b"<p>", content_length=99), it.connection.close()),
           "/noise": lambda it: it.wfile.write(os.urandom(64) + b"\r\n\r\n"),
           "/head": lambda it: it.answer(b"", jam="x" * 10**6)}
    site.pages |= odd | {"/": page(links(*odd))}
    assert len(read(tmp_path, site.url, timeout=1, max_bytes=100_000)) == 1
    reasons = why(tmp_path)
    assert [reasons[path] for path in ("/huge", "/endless", "/bomb")] == ["too large", "too large", "packed"]
    assert {reasons[path] for path in ("/slow-head", "/slow-body", "/silent")} == {"too slow"}
    assert all(reasons[path].startswith("no answer (") for path in ("/cut", "/noise", "/head"))
    assert sent["bytes"] < 20_000_000


@pytest.mark.parametrize("declared", ["header", "meta", "nowhere"])
@pytest.mark.parametrize("name", ["utf-8", "shift_jis", "euc-jp", "iso-2022-jp", "utf-16"])
def test_encodings(site, tmp_path, name, declared):
    text = "いちごジャムの作り方。苺と砂糖を鍋に入れて、弱火でゆっくり煮つめます。" * 4
    meta = f'<meta charset="{name}">' if declared == "meta" and name != "utf-16" else ""
    html = f"<html><head>{meta}</head><body><article><p>{text}</p></article>{BY}</body></html>"
    kind = "text/html" + (f"; charset={name}" if declared == "header" else "")
    site.pages["/"] = lambda it: it.answer(html.encode(name), content_type=kind)
    [row] = read(tmp_path, site.url)
    assert row["prompt"] == text and row["lang"] == "ja"


def test_bytes_that_are_no_text(site, tmp_path):
    body = page().replace(b"fruit", b"\xff\xfe\x00 caf\xe9")
    site.pages |= {"/lie": lambda it: it.answer(page().replace(b"fruit", "früit".encode("latin-1")),
                                                content_type="text/html; charset=utf-8"),
                   "/odd": lambda it: it.answer(body, content_type="text/html; charset=nonsense"),
                   "/rot13": lambda it: it.answer(page(), content_type="text/html; charset=rot13"),
                   "/noise": lambda it: it.answer(bytes(range(256)) * 400),
                   "/": page(links("/lie", "/odd", "/rot13", "/noise"))}
    texts = [row["prompt"] for row in read(tmp_path, site.url)]
    assert len(why(tmp_path)) == 5 and any("früit" in text for text in texts)
    assert not any("\ufffd" in text or "\0" in text for text in texts)


def test_wrong_types_and_hostile_html(site, tmp_path):
    kinds = {"/png": "image/png", "/pdf": "application/pdf", "/text": "text/plain", "/none": None, "/odd": "text/htm"}
    site.pages |= {path: lambda it, kind=kind: it.answer(page(), content_type=kind) for path, kind in kinds.items()}
    hostile = {"/deep": b"<div>" * 100_000, "/empty": b"", "/nul": b"\0" * 1000,
               "/attributes": b"<p " + b"a=1 " * 50_000,
               "/ld": page('<script type="application/ld+json">' + "[" * 100_000 + "</script>"),
               "/ld2": page('<script type="application/ld+json">[1, null, {"license": 7}]</script>'),
               "/href": page(links("http://[", "//", "\\\\", "http://a:b:c/", "x" * 5000, "?" + "y" * 99, "http://\ud7ff.é.x/"))}
    site.pages |= hostile | {"/": page(links(*kinds, *hostile))}
    rows = read(tmp_path, site.url)
    reasons = why(tmp_path)
    assert {reasons[path] for path in kinds} == {"not HTML"}
    assert all(reasons[path] for path in ("/deep", "/empty", "/nul", "/attributes"))
    assert f"{site.url}/href" in [row["url"] for row in rows]


@pytest.mark.parametrize("robots, allowed", [
    (404, True), (410, True), (b"", True), (b"# nothing is forbidden\n", True), (b"User-agent: *\nDisallow:\n", True),
    (b"\xef\xbb\xbfUser-agent: *\r\nDisallow: /other\r\n", True), (b"User-agent: other\nDisallow: /\n", True),
    (b"User-agent: *\nDisallow: /\n\nUser-agent: so8t\nAllow: /\n", True), (to("/moved.txt"), True),
    (b"User-agent: *\nDisallow: /\n", False), (b"user-agent: SO8T\ndisallow: /j*m$\n", False),
    (500, False), (503, False), (401, False), (403, False), (429, False), (204, False),
    (b"<html><p>Welcome</p></html>", False), (b"User-agent: *\nDisallow: \xff\xfe", False), (os.urandom(999), False),
    (to("/robots.txt"), False), (to("http://10.0.0.1/robots.txt"), False), (to("gopher://x/"), False),
    (lambda it: it.server.site.closing.wait(20), False), (lambda it: it.answer(b"#" * 600_000), False),
    (b"User-agent: *\nCrawl-delay: 86400\n", False), (b"User-agent: *\nCrawl-delay: nan\n", True)])
def test_robots(site, tmp_path, robots, allowed):
    site.pages |= {"/jam": page(), "/robots.txt": robots, "/moved.txt": b"User-agent: *\nDisallow: /other"}
    rows = read(tmp_path, f"{site.url}/jam", timeout=0.5)
    assert bool(rows) == allowed and ("/jam" in site.paths()) == allowed


def test_the_pause_is_the_longer_one(site, tmp_path):
    site.pages |= {"/": page(links("/a")), "/a": page(), "/robots.txt": b"User-agent: *\nCrawl-delay: 0.3\n"}
    read(tmp_path / "theirs", site.url)
    first, *times = (when for _, _, when in site.asked)
    assert times[1] - times[0] >= 0.3
    site.asked.clear()
    read(tmp_path / "ours", site.url, delay=0.5)
    times = [when for _, _, when in site.asked]
    assert all(later - sooner >= 0.5 for sooner, later in zip(times, times[1:], strict=False))


def test_depth_pages_per_host_and_site(site, sites, tmp_path):
    other = sites(jam=page())
    site.pages["*"] = lambda it: it.answer(page(links(it.path.rstrip("/") + "/x", "/y" + it.path, f"{other.url}/jam")))
    read(tmp_path / "depth", f"{site.url}/a", depth=1)
    assert site.paths() == ["/robots.txt", "/a", "/a/x", "/y/a"]
    site.asked.clear()
    assert len(read(tmp_path / "pages", f"{site.url}/a", depth=99, pages_per_host=7)) == 7
    assert len(site.asked) == 8 and other.asked == []


def test_who_has_enough_of_us_is_left_in_peace(site, tmp_path):
    site.pages |= {"/": page(links("/a", "/b", "/c")), "/a": page(), "/b": 429, "/c": page()}
    read(tmp_path, site.url)
    assert site.paths() == ["/robots.txt", "/", "/a", "/b"]


def test_licences_are_counted_and_text_without_one_is_not_kept(site, tmp_path):
    free = page().replace(BY.encode(), b"")
    site.pages |= {"/": page(links("/none", "/sa", "/noai")), "/none": free, "/sa": page().replace(b"/by/", b"/by-sa/"),
                   "/noai": lambda it: it.answer(page(), x_robots_tag="noai")}
    assert len(read(tmp_path, site.url)) == 1
    assert web.tally(tmp_path) == {
        "read": 1, "licence NOASSERTION": 1, "licence CC-BY-SA-4.0": 1, "its author asks for it": 1}
    assert disk.read_jsonl(tmp_path / "journal.jsonl")[2]["row"] is None


def test_nothing_is_remembered_for_the_server(site, tmp_path):
    site.pages |= {"/": lambda it: it.answer(page(links("/a")), set_cookie="me=1"), "/a": page()}
    read(tmp_path, site.url)
    assert not any("Cookie" in headers for _, headers, _ in site.asked)


def test_a_second_round_asks_what_changed(site, tmp_path):
    state = {"etag": '"1"', "last-modified": "Wed, 21 Oct 2015 07:28:00 GMT"}

    def same(asks, mark):
        def reply(it):
            known = it.headers.get(asks) == state[mark]
            it.answer(b"", 304) if known else it.answer(page(), **{mark: state[mark]})
        return reply

    site.pages |= {"/": page(links("/tag", "/date", "/moved")), "/moved": to("/tag2"),
                   "/tag": same("If-None-Match", "etag"), "/tag2": same("If-None-Match", "etag"),
                   "/date": same("If-Modified-Since", "last-modified")}
    first = read(tmp_path, site.url)
    site.asked.clear()
    assert read(tmp_path, site.url) == first and len(first) == 4
    assert Counter(site.paths()) == Counter(["/robots.txt", "/", "/tag", "/date", "/moved", "/tag2"])
    asks = {path: {name for name in headers if name.startswith("If-")} for path, headers, _ in site.asked}
    assert {path: name for path, name in asks.items() if name} == {
        "/tag": {"If-None-Match"}, "/tag2": {"If-None-Match"}, "/date": {"If-Modified-Since"}}
    state["etag"] = '"2"'
    site.pages["/"] = 500
    assert read(tmp_path, site.url, f"{site.url}/tag", f"{site.url}/date") == [first[1], first[2]]
    journal = disk.read_jsonl(tmp_path / "journal.jsonl")
    assert [row for row in journal if row["url"].endswith("/tag")][-1]["marks"] == {"If-None-Match": '"2"'}


def test_a_304_that_nobody_asked_for(site, tmp_path):
    site.pages["/"] = 304
    assert read(tmp_path, site.url) == [] and web.tally(tmp_path) == {"status 304": 1}


CHILD = """
import sys
from so8t.data.web import crawl
from so8t.flow.config import Web
settings = Web(user_agent_url="https://example.org/bot", delay=0, pages_per_host=100, depth=9)
for row in crawl([sys.argv[1]], settings, sys.argv[2], ["CC-BY-4.0"], loopback=True):
    print(row["url"], flush=True)
"""


def test_killed_and_resumed_nothing_is_fetched_twice(site, tmp_path):
    "The page on its way when the plug is pulled is asked for again; nothing that is in the journal is."
    stop, waiting = [3, 4, 11], Event()
    command = [sys.executable, "-c", CHILD, site.url, str(tmp_path)]

    def serve(it):
        number = int(it.path.strip("/") or 0)
        if stop and number == stop[0]:
            stop.pop(0)
            waiting.set()
            return site.closing.wait(20)
        it.answer(page(links(f"/{2 * number + 1}", f"/{2 * number + 2}") if number < 10 else ""))

    site.pages |= {"*": serve, "/robots.txt": 404}
    for _ in range(3):
        child = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        assert waiting.wait(60)
        waiting.clear()
        child.send_signal(signal.SIGKILL)
        child.wait()
    with (tmp_path / "journal.jsonl").open("ab") as journal:
        journal.write(b'{"url": "http://127.0.0.1/to')
    rows = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert rows == [f"{site.url}/{number or ''}" for number in range(21)]
    counts = Counter(site.paths())
    assert {path for path, count in counts.items() if count > 1} == {"/3", "/4", "/11"}
    assert set(counts.values()) == {1, 2} and counts["/robots.txt"] == 1
    assert web.tally(tmp_path) == {"read": 21}


def test_what_a_person_can_put_right(tmp_path):
    with pytest.raises(Problem, match="data.web.user_agent_url: is missing; name a page"):
        next(web.crawl([], Web(), tmp_path, []))
    with pytest.raises(Problem, match="data.web.seeds: http://me:secret@example.org/ is no web address"):
        read(tmp_path, "http://me:secret@example.org/")
    (tmp_path / "journal.jsonl").write_text("jam\n{}\n", encoding="utf-8")
    with pytest.raises(Problem, match="line 1 is not a JSON object"):
        read(tmp_path, "http://127.0.0.1:1/")
