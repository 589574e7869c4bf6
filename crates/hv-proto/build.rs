//! Compiles the contracts in `api/proto`: messages, services, canonical JSON, and the descriptors for reflection.

use std::path::PathBuf;

const FILES: [&str; 7] = [
    "hypervisor/v1/common.proto",
    "hypervisor/v1/compute.proto",
    "hypervisor/v1/agent.proto",
    "hypervisor/v1/cluster.proto",
    "hypervisor/v1/operation.proto",
    "hypervisor/v1/store.proto",
    "hypervisor/store/v1/record.proto",
];

fn main() -> Result<(), Box<dyn std::error::Error>> {
    // Read when it runs, as the built script may outlive the place that it was built in.
    let root = PathBuf::from(std::env::var("CARGO_MANIFEST_DIR")?).join("../../api/proto");
    println!("cargo:rerun-if-changed={}", root.display());
    let out = PathBuf::from(std::env::var("OUT_DIR")?);

    let descriptors = protox::compile(FILES, [&root])?;
    let encoded = prost::Message::encode_to_vec(&descriptors);
    std::fs::write(out.join("descriptors.bin"), &encoded)?;

    tonic_prost_build::configure()
        .compile_well_known_types(true)
        .extern_path(".google.protobuf.Timestamp", "::pbjson_types::Timestamp")
        .extern_path(".google.protobuf.Empty", "::pbjson_types::Empty")
        .bytes(".")
        .compile_fds(descriptors)?;

    pbjson_build::Builder::new()
        .register_descriptors(&encoded)?
        .build(&[".hypervisor.v1", ".hypervisor.store.v1"])?;
    Ok(())
}
