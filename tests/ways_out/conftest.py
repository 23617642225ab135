"""No test tells anybody that it ran: OpenVINO reports its imports and conversions by a package that it can spare."""

from __future__ import annotations

import sys

sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]
