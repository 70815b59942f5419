"""The demo: a real model, a real ``vllm serve --carbon``, real requests, and a report of what they cost."""
