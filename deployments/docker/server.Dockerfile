# The control plane. Built from the root of the repository: make docker-server
# Data of the embedded store is in /var/lib/hypervisor; with etcd as the store nothing is written.

ARG BUILD_IMAGE=rust:1.95-bookworm
ARG BASE_IMAGE=debian:bookworm-slim

FROM ${BUILD_IMAGE} AS build
RUN apt-get update && apt-get install -y --no-install-recommends protobuf-compiler libprotobuf-dev
WORKDIR /src
COPY . .
RUN cargo build --release --locked --package hypervisor-server --package hypervisor-ctl

FROM ${BASE_IMAGE}
RUN useradd --system --uid 901 --home-dir /var/lib/hypervisor --create-home --shell /usr/sbin/nologin hypervisor
COPY --from=build /src/target/release/hypervisor-server /src/target/release/hypervisor-ctl /usr/local/bin/
USER hypervisor
VOLUME /var/lib/hypervisor
# gRPC; HTTP: health, metrics.
EXPOSE 50051 8080
ENTRYPOINT ["hypervisor-server"]
CMD ["--data-dir", "/var/lib/hypervisor", "--grpc-address", ":50051", "--http-address", ":8080"]
