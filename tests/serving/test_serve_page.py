"""The page of `mgcc serve` in Chromium, with mouse and keyboard, and the files that it leaves."""

import base64
import threading
import time

import numpy as np
import pytest
import uvicorn
from chromium import browser, install
from PIL import Image
from serving_session import TOKEN, blob, open_session, png

from mgcc_dist.serving.app import create_app
from mgcc_dist.serving.server import bind

DROP = """
const data = new DataTransfer();
for (const [name, content] of arguments[0]) {
  data.items.add(new File([Uint8Array.from(atob(content), letter => letter.charCodeAt(0))], name));
}
document.dispatchEvent(new DragEvent("drop", { dataTransfer: data, bubbles: true, cancelable: true }));
"""


AXES = (
    "(arguments[0] - view.left) * view.scale - stageSize()[0] / 2",
    "(arguments[0] - view.top) * view.scale - stageSize()[1] / 2",
)
"""from a position on the image to the offset from the middle of the stage"""
DRAWN = """
const at = toScreen({ x: arguments[0], y: arguments[1] });
return document.getElementById("mask").getContext("2d").getImageData(at.x, at.y, 1, 1).data[3];
"""
"""how opaque the mask is drawn at a position on the image"""
WHEEL = """
const at = toScreen({ x: arguments[0], y: arguments[1] }), box = sheet.getBoundingClientRect();
const options = { deltaY: -120, clientX: at.x + box.left, clientY: at.y + box.top, cancelable: true };
sheet.dispatchEvent(new WheelEvent("wheel", options));
"""
"""zooms in at a position on the image"""
LEFT_OF_THE_IMAGE = """
const canvas = document.getElementById("mask"), width = Math.floor(toScreen({ x: 0, y: 0 }).x);
return canvas.getContext("2d").getImageData(0, 0, width, canvas.height).data.some(value => value);
"""
"""whether anything is drawn left of the image, such as the mask at an earlier zoom"""


@pytest.fixture
def page(tmp_path):
    install()
    pytest.importorskip("selenium")
    session = open_session(tmp_path / "out")
    with bind(0) as listener:
        server = uvicorn.Server(uvicorn.Config(create_app(session, TOKEN, 2**20), log_config=None, lifespan="on"))
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        driver = browser(tmp_path / "downloads")
        try:
            driver.get(f"http://127.0.0.1:{listener.getsockname()[1]}/#{TOKEN}")
            yield driver
        finally:
            driver.quit()
            server.should_exit = True
            thread.join()


def disc(mask, x, y, radius, value):
    """What one dab of the brush at (x, y) leaves."""
    rows, columns = np.mgrid[: mask.shape[0], : mask.shape[1]] + 0.5
    mask[np.hypot(columns - x, rows - y) <= radius] = value


def test_a_dropped_image_is_corrected_by_mouse_and_keyboard_and_saved(page, tmp_path):
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    def element(name):
        return page.find_element(By.ID, name)

    def press(*keys):
        ActionChains(page, duration=0).send_keys(*keys).perform()

    def wait_for(condition, *words):
        deadline = time.monotonic() + 20
        while not page.execute_script(f"return {condition}", *words):
            assert time.monotonic() < deadline, (condition, element("message").text)
            time.sleep(0.02)

    def drop(*files):
        page.execute_script(DROP, [[name, base64.b64encode(content).decode()] for name, content in files])

    def dab(x, y):
        """Press the mouse at pixel (x, y)."""
        offset = [page.execute_script(f"return Math.round({AXES[i]})", [x, y][i]) for i in range(2)]
        ActionChains(page, duration=0).move_to_element_with_offset(element("sheet"), *offset).click().perform()

    def mask():
        return np.array(page.execute_script("return Array.from(mask)"), np.uint8).reshape(32, 32)

    wait_for("state !== null")
    assert TOKEN not in page.current_url
    drop(("evil.svg", b"<svg onload='document.title = 1'/>"))
    wait_for("document.getElementById('message').textContent.startsWith('evil.svg: is neither an image')")
    assert element("message").get_attribute("role") == "alert"

    drop(("a.png", png(blob())))
    wait_for("item !== null")
    expected = np.where(blob() > 128, 255, 0).astype(np.uint8)
    assert np.array_equal(mask(), expected)
    rows = [row.text for row in page.find_elements(By.CSS_SELECTOR, "#measures tr")]
    assert rows[0] == "area 256 256"
    assert [page.execute_script(DRAWN, *at) for at in ((12, 12), (8.05, 12), (2, 2))] == [70, 255, 0]
    press("u")
    assert not element("heat").get_property("hidden")

    # Mouse: add a dab, undo and redo it, zoom in and erase another.
    fitted = page.execute_script("return view.scale")
    radius = page.execute_script("return Number(document.getElementById('size').value)")
    dab(28, 28)
    x, y = page.execute_script("return [brush.x, brush.y]")
    disc(expected, x, y, radius, 255)
    assert abs(x - 28) < 0.1
    assert np.array_equal(mask(), expected)
    press("z")
    assert np.array_equal(mask(), np.where(blob() > 128, 255, 0))
    press("y")
    assert np.array_equal(mask(), expected)
    element("erase").click()
    press("+", "+")
    page.execute_script(WHEEL, 16, 16)
    assert page.execute_script("return view.scale") > 1.6 * fitted
    dab(16, 16)
    x, y = page.execute_script("return [brush.x, brush.y]")
    disc(expected, x, y, radius, 0)
    assert np.array_equal(mask(), expected)

    # Keyboard: a larger brush, and a dab one pixel further left and up.
    press("a", "]", "]")
    element("sheet").send_keys(Keys.SHIFT, Keys.ARROW_LEFT, Keys.ARROW_UP, Keys.NULL, " ")
    page.execute_script("move(-100, 0)")
    press("0")
    assert page.execute_script("return view.scale") == fitted
    assert not page.execute_script(LEFT_OF_THE_IMAGE)
    larger = page.execute_script("return Number(document.getElementById('size').value)")
    disc(expected, x - 1, y - 1, larger, 255)
    assert larger > radius
    assert np.array_equal(mask(), expected)
    area = f"area 256 {np.count_nonzero(expected)}"
    wait_for("document.querySelector('#measures tr').innerText.replace(/\\s+/g, ' ').trim() === arguments[0]", area)

    # The address of a new start in the same tab keeps what was painted.
    page.execute_script("location.hash = arguments[0]", TOKEN)
    wait_for("document.getElementById('message').textContent.startsWith('Connected to the new start')")
    assert np.array_equal(mask(), expected)
    press("s")
    wait_for("document.getElementById('message').textContent.startsWith('Saved as a-')")
    (saved,) = (tmp_path / "out" / "masks").iterdir()
    assert np.array_equal(np.asarray(Image.open(saved)), expected)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "out" / "images" / saved.name)), blob())
    assert not page.execute_script("return unsaved")

    # The first of several files is shown while the others are read.
    drop(("b.png", png(blob(210))), ("evil.svg", b"<svg/>"), ("c.png", png(blob(220))))
    wait_for("list.length === 3 && item !== null")
    wait_for("document.getElementById('message').className === 'bad'")
    assert page.execute_script("return item.label") == "b.png"
    press("n")
    wait_for("item !== null && item.label === 'c.png'")
    origin = page.execute_script("return location.origin")
    loaded = page.execute_script("return performance.getEntriesByType('resource').map(entry => entry.name)")
    assert all(name.startswith((origin, "data:")) for name in loaded)
    severe = [entry["message"] for entry in page.get_log("browser") if entry["level"] == "SEVERE"]
    assert len(severe) == 2
    assert all("/api/uploads" in each for each in severe)  # the refused files
