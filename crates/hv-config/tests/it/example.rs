//! The test aid that holds an example file against the defaults.

use hv_config::{example_differences, keys_of_yaml};

use crate::settings::Settings;

const GOOD: &str = "\
# How much to log.
log_level: info
# The server.
server:
  # Where gRPC listens.
  grpc_address: :50051
  # Streams per connection.
  max_streams: 100
  # Development.
  dev: false
  # How long to drain.
  drain: 30s
# The store.
etcd:
  # Its members.
  endpoints: [\"http://127.0.0.1:2379\"]
  # The password.
  password: \"\"
# Labels.
labels: {}
# The node.
node_id:
# The cache.
cache: 512MiB
# The ratio.
ratio: 1.5
# Weights.
weights:
- 1
- -2
# Drivers.
drivers: []
";

#[test]
fn a_faithful_example_has_no_differences() {
    assert_eq!(example_differences::<Settings>(GOOD), Vec::<String>::new());
}

#[test]
fn every_kind_of_unfaithfulness_is_found() {
    for (from, to, expected) in [
        ("# Weights.\n", "\n", "weights: has no comment on the line above it"),
        ("drain: 30s", "drain: 31s", "server.drain: shows 31s, the default is 30s"),
        ("cache: 512MiB\n", "", "cache: missing, its default is 512MiB"),
        ("labels: {}", "label: {}", "unknown key \"label\""),
        ("dev: false", "dev: maybe", "expected true or false"),
        ("node_id:", "node_id: [", "not valid YAML"),
    ] {
        let differences = example_differences::<Settings>(&GOOD.replace(from, to));
        assert!(
            differences.iter().any(|difference| difference.contains(expected)),
            "{expected}: {differences:?}"
        );
    }
}

#[test]
fn keys_of_a_yaml_text_come_in_order_with_their_values() {
    let keys = keys_of_yaml("b: {c: 1, d: [x, y]}\na:\ne: {}\nf: \"\"\n").unwrap();
    let keys: Vec<(&str, &str)> = keys.iter().map(|(key, value)| (key.as_str(), value.as_str())).collect();
    assert_eq!(keys, [("b.c", "1"), ("b.d", "[x, y]"), ("a", "null"), ("e", "{}"), ("f", "\"\"")]);
}
