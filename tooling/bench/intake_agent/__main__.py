"""The real agent service without its lanes: it takes messages in and executes no run."""

from services.agent.__main__ import service

service.works = []

if __name__ == "__main__":
    service.run()
