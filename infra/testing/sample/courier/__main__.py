"""Courier of the sample: takes parcels to an office outside, in the order of their street."""

from infra.service import Service
from infra.testing.sample.courier import adapters, handlers
from infra.testing.sample.courier.settings import CourierSettings

service = Service("sample_courier", CourierSettings)
service.work(handlers.deliver, office=adapters.office)

if __name__ == "__main__":
    service.run()
