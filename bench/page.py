"""How fast the page draws its X-ray at a million tokens: 60 layers of 4 groups over 8,192 blocks, in a real Chromium.

    pip install playwright
    python bench/page.py [--chromium PATH] [--tokens N]

`draw` shows random tokens of an answer in one view, as scrubbing does; `pan` moves the view each time, which draws the
ground anew; both are the script's own time. `panel` scrubs in the whole panel, text and curve included, as the browser
gives frames: 60 a second at most. The last line of the output is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import sys
import threading
import time
from typing import Any

import uvicorn
from fastapi import FastAPI

from openm3.server import page

LAYERS, GROUPS, BLOCKS, SELECTED = 60, 4, 8192, 16

SCRIPT = """
async ({ layers, groups, blocks, selected, tokens }) => {
  const { Recording } = await import("/page/recording.js");
  const { BlockMap } = await import("/page/map.js");
  const { Xray } = await import("/page/xray.js");
  let seed = 1;
  const random = () => (seed = (seed * 48271) % 2147483647) / 2147483647;
  const rows = [...Array(layers)].map(() => [...Array(groups)].map(() => new Set([blocks - 1])));
  const step = (set) => {
    for (const block of [...set]) if (block < blocks - 1 && random() < 0.3) set.delete(block);
    while (set.size < selected) set.add(Math.floor(random() * blocks));
    return [...set].sort((a, b) => a - b);
  };
  const recording = new Recording({ messages: [{ role: "user", content: "" }], thinking: {} });
  for (let t = 0; t < tokens; t++) recording.add([t], [rows.map((layer) => layer.map(step))]);
  const colors = { fresh: 0xff005ed5, kept: 0xffb56800, ever: [0xffe9e4df, 0xffd2cac3, 0xffb8ada3] };
  const map = new BlockMap(document.createElement("canvas"), { ...colors, even: 0xffffffff, odd: 0xfff6f4f1 });
  map.show(recording);
  map.resize(1100, 480, devicePixelRatio);
  const timed = (frames, move) => {
    const times = [];
    for (let i = 0; i < frames + 20; i++) {
      move(i);
      const token = Math.floor(random() * tokens);
      const begin = performance.now();
      map.draw(token);
      if (i >= 20) times.push(performance.now() - begin);
    }
    times.sort((a, b) => a - b);
    return { median: times[frames >> 1], p99: times[Math.floor(frames * 0.99)] };
  };
  const draw = timed(500, () => {});
  map.zoom(1.2, 550);
  const pan = timed(200, (i) => map.move(3 * (i % 100)));
  const xray = new Xray();
  recording.finish();
  xray.open(recording);
  while (!document.querySelector("#tokens span")) await new Promise(requestAnimationFrame);
  const stamps = await new Promise((resolve) => {
    const found = [];
    const frame = (now) => {
      found.push(now);
      xray.go(Math.floor(random() * tokens));
      if (found.length > 240) resolve(found);
      else requestAnimationFrame(frame);
    };
    requestAnimationFrame(frame);
  });
  const gaps = stamps.slice(41).map((stamp, i) => stamp - stamps[i + 40]).sort((a, b) => a - b);
  const mean = gaps.reduce((sum, gap) => sum + gap) / gaps.length;
  return { draw, pan, panel: { mean, p99: gaps[Math.floor(gaps.length * 0.99)], frames_per_second: 1000 / mean } };
}
"""


def measure(chromium: str, tokens: int) -> dict[str, Any]:
    """Milliseconds a frame, by device pixel ratio."""
    from playwright.sync_api import sync_playwright

    found = {}
    app = FastAPI()
    app.include_router(page.routes(None))  # type: ignore[arg-type]  # the page's files ask nothing of a service

    @app.post("/xray/context")
    async def context() -> dict[str, Any]:
        parts = [{"role": "user", "source": f"{i}.txt", "tokens": [i << 17, (i + 1) << 17]} for i in range(8)]
        words = [f"word{i} " for i in range(tokens)]
        return {"context": "", "tokens": BLOCKS << 7, "block_size": 128, "parts": parts, "reply": words}

    shape = {"layers": LAYERS, "groups": GROUPS, "blocks": BLOCKS, "selected": SELECTED, "tokens": tokens}
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off", ws="none"))
        threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True).start()
        while not server.started:
            time.sleep(0.01)
        with sync_playwright() as driver:
            browser = driver.chromium.launch(
                executable_path=chromium, args=["--no-sandbox"] if os.geteuid() == 0 else []
            )
            for ratio in (1, 2):
                view = browser.new_page(viewport={"width": 1600, "height": 1000}, device_scale_factor=ratio)
                view.goto(f"http://127.0.0.1:{listener.getsockname()[1]}/")
                found[f"ratio {ratio}"] = view.evaluate(SCRIPT, shape)
                view.close()
            browser.close()
        server.should_exit = True
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chromium", default=shutil.which("chromium") or shutil.which("google-chrome"))
    parser.add_argument("--tokens", type=int, default=512, help="tokens of the answer (default: 512)")
    args = parser.parse_args()
    if args.chromium is None:
        sys.exit("no Chromium on this machine: --chromium PATH names one")
    found = measure(args.chromium, args.tokens)
    for ratio, parts in found.items():
        for name, times in parts.items():
            print(f"{ratio}  {name:<6}" + "".join(f"  {key} {value:.2f}" for key, value in times.items()))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
