"""Desk of the sample: each note becomes an event of its notebook's stream."""

from infra.service.service import Service
from tooling.testing.sample.desk import handlers
from tooling.testing.sample.desk.publishing import NOTEBOOK

service = Service("sample_desk")
service.own(NOTEBOOK)
service.consume(handlers.take_note)

if __name__ == "__main__":
    service.run()
