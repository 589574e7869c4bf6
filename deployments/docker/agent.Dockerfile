# The agent of one node, with QEMU. Built from the root of the repository: make docker-agent
# A virtual machine lives as long as the container: for machines that outlive their agent, run the agent on the host.
# Run with --device /dev/kvm where the host has it, the configuration mounted at /etc/hypervisor/agent.yaml and a
# volume at /var/lib/hypervisor.

ARG BUILD_IMAGE=rust:1.95-bookworm
ARG BASE_IMAGE=debian:bookworm-slim

FROM ${BUILD_IMAGE} AS build
WORKDIR /src
COPY . .
RUN cargo build --release --locked --package hypervisor-agent

FROM ${BASE_IMAGE}
RUN apt-get update \
    && apt-get install -y --no-install-recommends qemu-system-x86 qemu-utils \
    && rm -rf /var/lib/apt/lists/*
COPY --from=build /src/target/release/hypervisor-agent /usr/local/bin/
VOLUME /var/lib/hypervisor
EXPOSE 50052
ENTRYPOINT ["hypervisor-agent"]
CMD ["--config", "/etc/hypervisor/agent.yaml"]
