"""Desk of the sample: each note handed in becomes an event of its notebook's stream."""

from infra.service import Service
from infra.testing.sample.desk import handlers
from infra.testing.sample.desk.publishing import NOTEBOOK

service = Service("sample_desk")
service.own(NOTEBOOK)
service.consume(handlers.take_note)

if __name__ == "__main__":
    service.run()
