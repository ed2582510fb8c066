#!/usr/bin/env bash
# What runs on a TPU VM.
set -euo pipefail
