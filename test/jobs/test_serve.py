"""The server: answers, limits, hostile uploads, many at once, the page in a browser."""

import concurrent.futures
import json
import os
import signal
import subprocess
import sys
import time
import zipfile

import numpy as np
import pytest
from served import CLASSES, Served, serving, write_checkpoint
from videos import write_picture_video, write_video

pytest.importorskip("fastapi", reason="needs FastAPI: the lines of requirements.txt under serve")
pytest.importorskip("uvicorn")

from jobs import predict, serve
from jobs.upload_job import display_name, kind_of

BROWSER = "apt-get install --no-install-recommends chromium chromium-driver; pip install selenium"
CHROMIUM, DRIVER = "/usr/bin/chromium", "/usr/bin/chromedriver"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Return a checkpoint of a small video network."""
    return write_checkpoint(tmp_path_factory.mktemp("weights") / "tiny.safetensors")


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Return the paths of eight different videos."""
    folder = tmp_path_factory.mktemp("clips")
    return [
        write_picture_video(str(folder / f"{number}.mp4"), 20 + number, seed=number)
        for number in range(8)
    ]


@pytest.fixture(scope="module")
def served(checkpoint):
    """Serve with small limits."""
    limits = ("--max-mb", "2", "--upload-timeout", "2", "--header-timeout", "2",
              "--max-seconds", "60", "--max-megapixels", "1", "--queue", "16")  # fmt: skip
    with serving(checkpoint, *limits) as running:
        yield running


@pytest.fixture(autouse=True)
def nothing_is_left(request):
    """Look whether files outlived their requests."""
    yield
    if "served" in request.fixturenames:
        running = request.getfixturevalue("served")
        deadline = time.monotonic() + 10
        while os.listdir(running.folder) or running.engine.in_flight:
            assert time.monotonic() < deadline, os.listdir(running.folder)
            time.sleep(0.05)


def content_of(path):
    with open(path, "rb") as stream:
        return stream.read()


def predicted(checkpoint, paths, tmp_path, *words):
    """Return what predict.py says of files."""
    target = str(tmp_path / "predictions.jsonl")
    assert predict.main([checkpoint, *paths, "--gpus", "", "--num-workers", "0",
                         "--output", target, "--top-k", "8", *words]) == 0  # fmt: skip
    with open(target) as stream:
        return [json.loads(line) for line in stream]


def test_a_file_has_the_same_scores_as_in_predict(served, checkpoint, clips, tmp_path):
    expected = predicted(checkpoint, clips, tmp_path)
    assert len({row["top"][0]["score"] for row in expected}) == len(clips)
    for path, row in zip(clips, expected):
        status, answer = served.post(content_of(path), "top=8")
        assert status == 200, answer
        assert {found["class"] for found in answer["top"]} == set(range(8))
        ours = {found["class"]: found["score"] for found in row["top"]}
        for found in answer["top"]:
            assert found["score"] == pytest.approx(ours[found["class"]], abs=2e-6)
            assert found["name"] == CLASSES[found["class"]]


def test_windows_strip_and_maps(served, clips, checkpoint, tmp_path):
    path = write_picture_video(str(tmp_path / "long.mp4"), 75, seed=3)
    status, answer = served.post(
        content_of(path), "windows=1&strip=1&maps=1&top=8&name=../../etc/%0Apass%00wd"
    )
    assert status == 200, answer
    assert (answer["kind"], answer["frames"], answer["seconds"]) == ("video", 75, 3.0)
    assert answer["file"] == "passwd"
    starts = [window["start"] for window in answer["windows"]]
    assert starts == sorted(starts)
    assert (starts[0], answer["windows"][-1]["end"]) == (0.0, pytest.approx(3.0, abs=0.31))
    # A window is what --stride gives of the same place.
    rows = predicted(checkpoint, [path], tmp_path, "--stride", "0.3")
    by_start = {row["start"]: row["top"] for row in rows if "start" in row}
    compared = 0
    for window in answer["windows"]:
        if window["start"] in by_start:
            compared += 1
            for ours, theirs in zip(by_start[window["start"]], window["top"]):
                assert ours["score"] == pytest.approx(theirs["score"], abs=2e-6)
    assert compared
    assert [frame["seconds"] for frame in answer["strip"]] == sorted(
        frame["seconds"] for frame in answer["strip"]
    )
    assert len(answer["strip"]) == len(answer["clip"]) == 8
    maps = answer["maps"]
    assert maps["unit"] == "conv4_B01"
    shape = np.array(maps["strongest"][0]["map"]).shape
    assert len(maps["strongest"]) == 4
    assert shape == (4, 4, 4)
    shares = [node["energy_share"] for node in maps["strongest"]]
    assert shares == sorted(shares, reverse=True)
    largest = max(np.abs(node["map"]).max() for node in maps["strongest"])
    assert maps["scale"] == pytest.approx(largest, abs=1e-4)


def test_eight_at_once_get_their_own_answers(served, clips, checkpoint, tmp_path):
    expected = [row["top"][0]["score"] for row in predicted(checkpoint, clips, tmp_path)]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(served.post, map(content_of, clips), ["top=1"] * 8))
    for (status, answer), score in zip(answers, expected):
        assert status == 200, answer
        assert answer["top"][0]["score"] == pytest.approx(score, abs=2e-6)


def test_health_answers_during_a_prediction(served, clips, monkeypatch):
    slow = served.engine.run

    def run(data):
        time.sleep(1.5)
        return slow(data)

    monkeypatch.setattr(served.engine, "run", run)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(served.post, content_of(clips[0]))
        time.sleep(0.5)
        started = time.monotonic()
        status, text = served.get("/health")
        assert time.monotonic() - started < 0.5
        assert not waiting.done()
        assert (status, json.loads(text)) == (200, {"status": "ok", "in_flight": 1})
        assert waiting.result()[0] == 200
    text = served.get("/metrics")[1]
    assert 'glore_responses_total{status="200"}' in text
    assert 'glore_seconds{quantile="0.99"}' in text


def test_garbage_is_refused_with_a_reason_and_a_good_file_answered_then(served, clips):
    whole = content_of(clips[0])
    for content, reason in [
        (b"garbage" * 100, "neither a video nor an image"),
        (whole[: len(whole) // 3], "cannot be read"),
        (b"", "no body"),
        (b"\x89PNG\r\n\x1a\n" + bytes(50), "it is an image; this network reads videos"),
        (b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n", "neither a video"),
    ]:
        status, answer = served.post(content)
        assert status in (400, 422)
        assert reason in answer["error"]
        assert served.folder not in answer["error"]
        assert served.post(whole)[0] == 200


def test_limits_of_length_and_size(served, tmp_path):
    for path, reason in [
        (write_video(str(tmp_path / "long.mp4"), 25 * 61, (16, 16)), "it lasts 61 s, more than"),
        (
            write_video(str(tmp_path / "large.mp4"), 3, (1280, 1024)),
            "1280 x 1024 pixels are larger",
        ),
    ]:
        status, answer = served.post(content_of(path))
        assert status == 422
        assert reason in answer["error"]


def test_a_body_over_the_limit(served):
    head = b"POST /predict HTTP/1.1\r\nHost: x\r\n"
    large = bytes(3_000_000)
    declared = served.raw(head + b"Content-Length: 3000000\r\n\r\n" + large[:10])
    assert declared.startswith(b"HTTP/1.1 413")
    assert b"more than 2 MB" in declared
    chunk = b"%x\r\n%s\r\n" % (100_000, large[:100_000])
    chunked = served.raw(head + b"Transfer-Encoding: chunked\r\n\r\n", *[chunk] * 30)
    assert chunked == b"" or chunked.startswith(b"HTTP/1.1 413")
    # More than was declared: what is too much is no part of the body.
    lying = served.raw(head + b"Content-Length: 100\r\n\r\n" + large[:100_000])
    assert lying.startswith((b"HTTP/1.1 422", b"HTTP/1.1 400"))
    assert served.raw(head + b"Content-Length: -5\r\n\r\n" + large[:10]).startswith(b"HTTP/1.1 400")


def test_slow_clients_are_closed_after_a_time_in_all(served):
    head = b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n"
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        started = time.monotonic()
        drip = pool.submit(served.raw, head, *[b"x"] * 30, pause=0.2)
        silent = pool.submit(served.raw, head + b"x")
        headers = pool.submit(
            served.raw, b"POST /predict HTTP/1.1\r\n", *[b"A: b\r\n"] * 30, pause=0.2
        )
        assert b"408" in drip.result()[:20] or drip.result() == b""
        assert silent.result().startswith(b"HTTP/1.1 408")
        assert not headers.result().startswith(b"HTTP/1.1 2")
        assert time.monotonic() - started < 12
    assert served.get("/health")[0] == 200


def test_a_client_that_leaves_is_no_error(served, clips, caplog):
    whole = content_of(clips[0])
    head = b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(whole)
    for part in (whole[:100], whole):
        served.raw(head + part, read=False)
    time.sleep(0.5)
    assert "Traceback" not in caplog.text
    assert served.post(whole)[0] == 200


def test_the_page_of_another_site_is_refused(served, clips):
    whole = content_of(clips[0])
    assert served.post(whole, headers={"Origin": "http://evil.example"})[0] == 403
    own = {"Origin": f"http://127.0.0.1:{served.port}"}
    assert served.post(whole, headers=own)[0] == 200


def test_fifty_hostile_uploads_leave_the_server_up_and_its_folder_empty(served, clips, tmp_path):
    whole = content_of(clips[0])
    archive = tmp_path / "a.zip"
    with zipfile.ZipFile(archive, "w") as content:
        content.writestr("../../x.mp4", bytes(100_000))
    head = b"POST /predict?name=../../x HTTP/1.1\r\nHost: x\r\n"
    huge = b"X: " + b"y" * 200_000 + b"\r\n"
    random = np.random.RandomState(0)
    damaged = []
    for _ in range(24):
        broken = bytearray(whole)
        for place in random.randint(0, len(whole), 60):
            broken[place] = random.randint(256)
        damaged.append(bytes(broken))
    sizes = range(8, len(whole), len(whole) // 9)
    length = b"Content-Length: %d\r\n\r\n" % len(whole)
    outside = b"GET /../../etc/passwd HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    attacks = [
        *(lambda part=whole[:size]: served.post(part) for size in sizes),
        *(lambda part=part: served.post(part) for part in damaged),
        lambda: served.post(archive.read_bytes()),
        lambda: served.post(b"<html><script>alert(1)</script></html>"),
        lambda: served.raw(head + huge + b"\r\n"),
        lambda: served.raw(head + b"Content-Length: abc\r\n\r\nxx"),
        lambda: served.raw(head + b"Content-Length: -1\r\n\r\nxx"),
        lambda: served.raw(head + b"Content-Length: 5\r\nContent-Length: 7\r\n\r\nxxxxx"),
        lambda: served.raw(head + b"Content-Length: 99999999999\r\n\r\nxx"),
        lambda: served.raw(head + b"Content-Length: 500\r\n\r\nxx", read=False),
        lambda: served.raw(head + b"Transfer-Encoding: chunked\r\n\r\nZZ\r\n"),
        lambda: served.raw(head + b"Transfer-Encoding: chunked\r\n\r\n5\r\nabc"),
        lambda: served.raw(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", timeout=3),
        lambda: served.raw(outside),
        *(
            lambda n=n: served.raw(head + length, whole[:n], read=False)
            for n in (1, 1000, len(whole))
        ),
        lambda: served.post(whole, "top=0"),
        lambda: served.post(whole, "top=99999999999999999999"),
        lambda: served.post(whole, "name=" + "%2e%2e%2f" * 500),
        lambda: served.post(b"RIFF\xff\xff\xff\xffAVI " + bytes(2000)),
        lambda: served.post(whole[:4] + b"ftyp" + b"\xff" * 1000),
    ]
    assert len(attacks) >= 50
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for future in [pool.submit(attack) for attack in attacks]:
            future.result()
    status, answer = served.post(whole)
    assert status == 200, answer
    assert served.get("/health")[0] == 200
    # That nothing is left is looked at after each test.


def test_overload_is_answered_and_nothing_is_lost(checkpoint, clips):
    whole = content_of(clips[0])
    with serving(checkpoint, "--queue", "2") as running:
        slow = running.engine.run
        running.engine.run = lambda data: (time.sleep(0.3), slow(data))[1]
        with concurrent.futures.ThreadPoolExecutor(10) as pool:
            answers = [future.result() for future in
                       [pool.submit(running.post, whole) for _ in range(20)]]  # fmt: skip
        statuses = [status for status, _ in answers]
        assert set(statuses) == {200, 503}
        assert statuses.count(200) >= 2
        assert running.post(whole)[0] == 200
        assert running.engine.in_flight == 0
        assert os.listdir(running.folder) == []
    assert not os.path.exists(running.folder)


def test_a_file_that_kills_its_decoder_costs_one_request(served, clips):
    whole = content_of(clips[0])
    for pid in served.engine.pool.pids():
        os.kill(pid, signal.SIGKILL)
    assert served.post(whole)[0] == 200
    assert served.get("/health")[0] == 200


def test_images_and_another_backend(tmp_path):
    pytest.importorskip("onnxruntime")
    cv2 = pytest.importorskip("cv2")
    checkpoint = write_checkpoint(
        tmp_path / "image.safetensors", "resnet18_w-glore_1-1", CLASSES[:5], size=64
    )
    path = str(tmp_path / "a.png")
    picture = np.random.RandomState(0).randint(0, 256, (90, 120, 3)).astype("uint8")
    cv2.imwrite(path, cv2.GaussianBlur(picture, (0, 0), 3))
    expected = predicted(checkpoint, [path], tmp_path)[0]["top"]
    with serving(checkpoint, "--backend", "onnx") as running:
        status, answer = running.post(content_of(path), "top=5&maps=1&strip=1&windows=1")
        assert status == 200, answer
        assert answer["kind"] == "image"
        for ours, theirs in zip(expected, answer["top"]):
            assert ours["class"] == theirs["class"]
            assert ours["score"] == pytest.approx(theirs["score"], abs=1e-5)
        assert np.array(answer["maps"]["strongest"][0]["map"]).shape == (1, 4, 4)
        assert running.post(b"RIFF\0\0\0\0AVI " + bytes(100))[0] == 422


@pytest.mark.slow
def test_memory_is_flat_over_many_requests(checkpoint, clips):
    whole = content_of(clips[0])

    def resident():
        with open("/proc/self/statm") as stream:
            return int(stream.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    with serving(checkpoint) as running:
        for _ in range(50):
            running.post(whole, "windows=1&maps=1&strip=1")
        before = resident()
        for _ in range(200):
            assert running.post(whole, "windows=1&maps=1&strip=1")[0] == 200
        assert resident() - before < 20e6


def test_names_and_kinds():
    assert display_name("..\\..\\a\x00\n.mp4") == "a.mp4"
    assert display_name("/etc/passwd") == "passwd"
    assert len(display_name("x" * 999)) == 200
    assert kind_of(b"\0\0\0\x20ftypisom" + bytes(8)) == "video"
    assert kind_of(b"\0\0\0\x20ftypavif" + bytes(8)) == "image"
    assert kind_of(b"RIFF\0\0\0\0WEBP") == "image"
    assert kind_of(b"PK\3\4" + bytes(12)) is None
    assert kind_of(b"") is None


def test_an_address_for_everyone_is_warned_of_and_a_taken_port_is_one_message(checkpoint, root):
    assert serve.is_own("127.0.0.1")
    assert serve.is_own("::1")
    assert serve.is_own("localhost")
    assert not serve.is_own("0.0.0.0")
    taken = serve.listen("127.0.0.1", 0)
    port = str(taken.getsockname()[1])
    command = [sys.executable, "serve.py", checkpoint, "--port", port]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=60)
    taken.close()
    assert done.returncode == 2
    assert f"cannot listen on 127.0.0.1:{port}" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_command_ends_when_it_is_told_to(checkpoint, clips, root, tmp_path):
    command = [sys.executable, "serve.py", checkpoint, "--port", "0", "--host", "0.0.0.0"]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    process = subprocess.Popen(
        command, cwd=root, stderr=subprocess.PIPE, text=True, env=environment
    )
    try:
        lines = []
        for line in process.stderr:
            lines.append(line)
            if "Serving" in line:
                break
        assert any("neither a password nor encryption" in line for line in lines)
        port = int(lines[-1].split(":")[-1].split("/")[0])
        deadline = time.monotonic() + 30
        while True:
            try:
                assert Served(port).post(content_of(clips[0]))[0] == 200
                break
            except OSError:
                assert time.monotonic() < deadline
                time.sleep(0.1)
        process.terminate()
        assert process.wait(30) in (0, -signal.SIGTERM)
    finally:
        process.kill()
        process.wait()
        process.stderr.close()
    assert [name for name in os.listdir(tmp_path) if name.startswith("glore-serve")] == []


# --- browser --------------------------------------------------------------------------------------


@pytest.fixture
def browser(tmp_path, monkeypatch):
    """Return headless Chromium."""
    reason = f"the browser test needs: {BROWSER}"
    webdriver = pytest.importorskip("selenium.webdriver", reason=reason)
    if not (os.path.exists(CHROMIUM) and os.path.exists(DRIVER)):
        pytest.skip(reason)
    # No download of a driver, and no report of its use.
    monkeypatch.setenv("SE_OFFLINE", "true")
    monkeypatch.setenv("SE_AVOID_STATS", "true")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    flags = ("headless=new", "no-sandbox", "disable-dev-shm-usage", "window-size=1000,1400")
    for flag in (*flags, f"user-data-dir={tmp_path / 'profile'}"):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(service=webdriver.ChromeService(DRIVER), options=options)
    driver.set_page_load_timeout(30)
    yield driver
    driver.quit()


def wait_until(condition, what):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def test_the_page_in_a_browser(served, browser, tmp_path):
    # mp4v, which Chromium does not play.
    path = write_picture_video(str(tmp_path / "two words ä.mp4"), 75, seed=3)
    browser.get(f"http://127.0.0.1:{served.port}/")

    def find(selector):
        return browser.find_elements("css selector", selector)

    wait_until(lambda: "8 classes" in find("#model")[0].text, "no model")
    find("#file")[0].send_keys(path)
    wait_until(
        lambda: browser.execute_script("return document.body.dataset.done") == "1", "no result"
    )
    expected = served.post(content_of(path), "windows=1&strip=1&maps=1")[1]
    rows = find("#top .row")
    assert [row.find_element("css selector", ".name").text for row in rows] == [
        found["name"] for found in expected["top"]
    ]
    assert rows[0].find_element("css selector", ".score").text == (
        f"{100 * expected['top'][0]['score']:.1f} %"
    )
    assert "3.00 s, 75 frames" in find("#status")[0].text
    assert len(find("#strip img")) == 8
    widths = browser.execute_script(
        "return [...document.querySelectorAll('#strip img')].map((i) => i.naturalWidth)"
    )
    assert min(widths) > 50
    assert len(find("#windows circle")) >= len(expected["windows"])
    # The frames' row, and one for each of four nodes; four slices of time each.
    assert len(find("#maps tr")) == 5
    assert len(find("#maps canvas")) == 20
    pixel = browser.execute_script(
        "const c = document.querySelectorAll('#maps canvas')[4];"
        "return [...c.getContext('2d').getImageData(10, 10, 1, 1).data]"
    )
    assert pixel[3] == 255
    browser.set_window_size(1000, 1500)
    target = os.environ.get("GLORE_SCREENSHOT", str(tmp_path / "page.png"))
    assert browser.save_screenshot(target)

    bad = tmp_path / "bad.mp4"
    bad.write_bytes(b"no video at all")
    find("#file")[0].send_keys(str(bad))
    wait_until(lambda: find("#status.bad"), "no message")
    assert "neither a video nor an image" in find("#status")[0].text
    assert not find("#result")[0].is_displayed()
    # A refused file is a failed resource to the browser; nothing else is in its log.
    log = [line for line in browser.get_log("browser") if "422" not in line["message"]]
    assert log == []
