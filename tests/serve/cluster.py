"""A Ray cluster of this machine alone that serves until a line comes in: `python cluster.py PORT '{"replicas": ...}'`."""

from __future__ import annotations

import json
import sys

import ray
from ray import serve

from dlm.serve import ray_app

if __name__ == "__main__":
    ray.init(address="local", num_cpus=2, include_dashboard=False, object_store_memory=80_000_000, logging_level="error")
    serve.start(http_options={"host": "127.0.0.1", "port": int(sys.argv[1])}, logging_config={"log_level": "ERROR"})
    serve.run(ray_app.app(json.loads(sys.argv[2])), blocking=False)
    print("ready", flush=True)
    sys.stdin.readline()
    serve.delete("default")
    serve.shutdown()
    ray.shutdown()
    print("ended", flush=True)
