"""Front of the sample. Serves: HTTP ``POST /notes``, gRPC ``Sample``. Sends: sample.v1.TakeNote."""
