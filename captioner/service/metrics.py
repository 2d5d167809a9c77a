"""What Prometheus is told."""

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector

CONTENT_TYPE = CONTENT_TYPE_LATEST


class Metrics:
    """Counts of one service; a registry of its own, so that several can live in one process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        self.requests = Counter("caption_requests", "Answers to POST, by status", ["status"], registry=self.registry)
        self.request_seconds = Histogram(
            "caption_request_seconds",
            "From a request's head to its answer",
            buckets=(0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50),
            registry=self.registry,
        )
        self.pictures = Counter("caption_pictures", "Pictures by outcome", ["outcome"], registry=self.registry)
        self.batch_size = Histogram(
            "caption_batch_size", "Pictures in a batch", buckets=(1, 2, 4, 8, 16, 32, 64), registry=self.registry
        )
        self.batch_seconds = Histogram(
            "caption_batch_seconds",
            "Computing of a batch",
            buckets=(0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10),
            registry=self.registry,
        )
        self.queue = Gauge("caption_queue_pictures", "Pictures waiting or at work", registry=self.registry)
        self.expected = Gauge(
            "caption_expected_seconds", "Until a picture that came now would have its caption", registry=self.registry
        )
        self.buffered = Gauge("caption_buffered_bytes", "Bytes of bodies in memory", registry=self.registry)

    def observe_batch(self, size: int, seconds: float) -> None:
        self.batch_size.observe(size)
        self.batch_seconds.observe(seconds)

    def text(self) -> bytes:
        """All values in Prometheus' text format."""
        return generate_latest(self.registry)
