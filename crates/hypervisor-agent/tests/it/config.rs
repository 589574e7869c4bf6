//! The settings and their example.

use hv_config::{Sources, example_differences};
use hypervisor_agent::config::Config;

const EXAMPLE: &str = include_str!("../../../../configs/agent.example.yaml");

#[test]
fn the_example_file_has_every_key_with_its_default_and_a_comment() {
    assert_eq!(example_differences::<Config>(EXAMPLE), Vec::<String>::new());
}

#[test]
fn the_defaults_can_be_used() {
    assert_eq!(Config::default().check(), Ok(()));
}

#[test]
fn a_short_port_moves_the_grpc_address() {
    let config = |text: &str| Sources::new().text("t", text).load::<Config>().unwrap().value;
    assert_eq!(config("agent: {port: 6000}").grpc_address().to_string(), ":6000");
    assert_eq!(config("agent: {grpc_address: '127.0.0.1:1'}").grpc_address().to_string(), "127.0.0.1:1");
}

#[test]
fn what_cannot_be_used_is_refused_with_its_key() {
    for (text, key) in [
        ("agent: {node_id: 'a/b'}", "agent.node_id"),
        ("agent: {server_addr: nonsense}", "agent.server_addr"),
        ("agent: {server_addr: 'https://a:1'}", "agent.server_addr"),
        ("agent: {server_addr: 'a:1,nonsense'}", "agent.server_addr"),
        ("agent: {fencing: {margin: 100ms}}", "agent.fencing.margin"),
        ("agent: {port: 1, grpc_address: ':2'}", "agent.port"),
        ("agent: {labels: {'a b': c}}", "agent.labels"),
        ("agent: {state_dir: ''}", "agent.state_dir"),
        ("heartbeat: {interval: 0s}", "heartbeat.interval"),
        ("tls: {enabled: true}", "tls.cert_file"),
    ] {
        let config = Sources::new().text("t", text).load::<Config>().unwrap().value;
        assert_eq!(config.check().unwrap_err().key, key, "{text}");
    }
}

#[test]
fn the_environment_reaches_nested_keys() {
    let variables =
        [("HYPERVISOR_AGENT_SERVER_ADDR", "a:1"), ("HYPERVISOR_DRIVERS_FAKE_SCRIPT", "delay-start=1s")];
    let config = Sources::new().environment(variables).load::<Config>().unwrap().value;
    assert_eq!(config.agent.server_addr, "a:1");
    assert_eq!(config.drivers.fake.script["delay-start"], "1s");
}
