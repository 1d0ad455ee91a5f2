"""Serve a diffusion model and call it with OpenAI's client (pip install 'dlm[serve]' openai).

python examples/serve_openai.py [PORT]
"""

import subprocess
import sys
import time
import urllib.error
import urllib.request

from openai import OpenAI

port = sys.argv[1] if len(sys.argv) > 1 else "8321"
address = f"http://127.0.0.1:{port}"

server = subprocess.Popen([sys.executable, "-m", "dlm", "serve", "shakespeare-mask", "--port", port])
try:
    while True:
        try:
            urllib.request.urlopen(f"{address}/healthz")
            break
        except urllib.error.URLError:
            if server.poll() is not None:
                raise SystemExit("the server ended, see above") from None
            time.sleep(0.2)

    client = OpenAI(base_url=f"{address}/v1", api_key="none")
    answer = client.completions.create(model="shakespeare-mask", prompt="ROMEO:", max_tokens=40, seed=1, extra_body={"steps": 16})
    print("ROMEO:" + answer.choices[0].text)

    # A diffusion model can fill the middle too: `suffix` is the text that has to follow.
    answer = client.completions.create(
        model="shakespeare-mask", prompt="ROMEO: ", suffix=" JULIET", max_tokens=16, extra_body={"steps": 16}
    )
    print("ROMEO: " + answer.choices[0].text + " JULIET")
finally:
    server.terminate()
    server.wait()
