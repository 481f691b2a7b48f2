"""Front of the sample: accepts notes, and the ledger reports its counts to it."""

from infra.service.service import Service
from tooling.testing.sample.front import api, rpc

service = Service("sample_front")
service.serve_http(api.routes)
service.serve_grpc(rpc.servicer)

if __name__ == "__main__":
    service.run()
