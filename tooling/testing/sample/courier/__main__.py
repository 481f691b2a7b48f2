"""Courier of the sample: delivers the parcels of each street in order, by calls to an external office."""

from infra.service.service import Service
from tooling.testing.sample.courier import adapters, handlers
from tooling.testing.sample.courier.settings import CourierSettings

service = Service("sample_courier", CourierSettings)
service.work(handlers.deliver, office=adapters.office)

if __name__ == "__main__":
    service.run()
