//! Precedence, the environment, flags, origins, secrets.

use hv_config::{ConfigError, Loaded, Origin, Sources};
use proptest::prelude::*;
use serde::{Deserialize, Serialize};

use crate::settings::{Level, Settings};

fn from_environment(variables: &[(&str, &str)]) -> Result<Loaded<Settings>, ConfigError> {
    Sources::new().environment(variables.iter().copied()).load()
}

fn refusal(variables: &[(&str, &str)]) -> String {
    from_environment(variables).map(|loaded| loaded.value).expect_err("the value is bad").to_string()
}

#[test]
fn without_sources_the_defaults_hold() {
    let loaded: Loaded<Settings> = Sources::new().load().unwrap();
    assert_eq!(loaded.value, Settings::default());
    assert!(loaded.show().iter().all(|row| row.origin == Origin::Default));
}

#[test]
fn a_flag_beats_the_environment_beats_the_file_beats_the_default() {
    let file = "server:\n  grpc_address: :1\n  drain: 1s\n  max_streams: 1\n";
    let loaded: Loaded<Settings> = Sources::new()
        .text("server.yaml", file)
        .environment([("HYPERVISOR_SERVER_GRPC_ADDRESS", ":2"), ("HYPERVISOR_SERVER_DRAIN", "2s")])
        .flag("server.grpc_address", "--grpc-address", Some(":3"))
        .flag("server.dev", "--dev", None::<bool>)
        .load()
        .unwrap();

    let shown: Vec<String> = loaded
        .show()
        .iter()
        .filter(|row| row.key.starts_with("server."))
        .map(|row| format!("{} = {} ({})", row.key, row.value, row.origin))
        .collect();
    assert_eq!(
        shown,
        [
            "server.grpc_address = :3 (flag --grpc-address)",
            "server.max_streams = 1 (file server.yaml:4)",
            "server.dev = false (default)",
            "server.drain = 2s (environment HYPERVISOR_SERVER_DRAIN)",
        ]
    );
}

#[test]
fn setting_one_key_of_a_section_keeps_the_outer_defaults_of_the_others() {
    let loaded = from_environment(&[("HYPERVISOR_ETCD_PASSWORD", "x")]).unwrap();
    assert_eq!(loaded.value.etcd.endpoints, ["http://127.0.0.1:2379"]);
}

#[test]
fn the_environment_writes_every_kind_of_value() {
    let loaded = from_environment(&[
        ("HYPERVISOR_LOG_LEVEL", "debug"),
        ("HYPERVISOR_SERVER_DEV", "TRUE"),
        ("HYPERVISOR_ETCD_ENDPOINTS", "http://a:1, http://b:2"),
        ("HYPERVISOR_LABELS", "rack=r7,disk=ssd"),
        ("HYPERVISOR_NODE_ID", "007"),
        ("HYPERVISOR_CACHE", "1GiB"),
        ("HYPERVISOR_RATIO", "2"),
        ("HYPERVISOR_WEIGHTS", "[3, -4]"),
        ("PATH", "/bin"),
    ])
    .unwrap();
    let value = loaded.value;
    assert_eq!(value.log_level, Level::Debug);
    assert!(value.server.dev);
    assert_eq!(value.etcd.endpoints, ["http://a:1", "http://b:2"]);
    assert_eq!(value.labels, [("rack".into(), "r7".into()), ("disk".into(), "ssd".into())].into());
    assert_eq!(value.node_id.as_deref(), Some("007"));
    assert_eq!(value.cache.to_string(), "1GiB");
    assert_eq!(value.weights, [3, -4]);
}

#[test]
fn an_empty_variable_takes_back_what_the_file_says() {
    let loaded: Loaded<Settings> = Sources::new()
        .text("f", "node_id: a\nlabels: {a: b}\netcd: {endpoints: [x]}\n")
        .environment([
            ("HYPERVISOR_NODE_ID", ""),
            ("HYPERVISOR_LABELS", ""),
            ("HYPERVISOR_ETCD_ENDPOINTS", ""),
        ])
        .load()
        .unwrap();
    assert_eq!(loaded.value.node_id, None);
    assert!(loaded.value.labels.is_empty() && loaded.value.etcd.endpoints.is_empty());
}

#[test]
fn repeated_flags_fill_lists_and_maps() {
    let loaded: Loaded<Settings> = Sources::new()
        .repeated_flag("etcd.endpoints", "--etcd", ["http://a,b", "http://c"])
        .repeated_flag("labels", "--label", ["a=1", "b=x,y"])
        .repeated_flag("weights", "--weight", Vec::<String>::new())
        .load()
        .unwrap();
    assert_eq!(loaded.value.etcd.endpoints, ["http://a,b", "http://c"]);
    assert_eq!(loaded.value.labels["b"], "x,y");
    assert_eq!(loaded.value.weights, [1, -2]);
}

#[test]
fn an_unknown_variable_is_refused_with_the_nearest_one() {
    let message = refusal(&[("HYPERVISOR_SERVER_GRPC_ADRESS", ":1")]);
    assert!(message.contains("\"HYPERVISOR_SERVER_GRPC_ADRESS\""), "{message}");
    assert!(message.contains("did you mean \"HYPERVISOR_SERVER_GRPC_ADDRESS\"?"), "{message}");
    let message = refusal(&[("HYPERVISOR_XYZZY", "1")]);
    assert!(message.contains("known are HYPERVISOR_LOG_LEVEL, "), "{message}");
}

#[test]
fn variables_of_tools_and_of_the_caller_are_left_alone() {
    let load = |name: &'static str| {
        let sources = Sources::new().allow_variables(["HYPERVISOR_OUTPUT", "HYPERVISOR_TEST_*"]);
        sources.environment([(name, "x")]).load::<Settings>()
    };
    for name in ["HYPERVISOR_SKIP_LOG", "HYPERVISOR_CRASH_AT", "HYPERVISOR_OUTPUT", "HYPERVISOR_TEST_A"] {
        assert!(load(name).is_ok(), "{name}");
    }
    assert!(load("HYPERVISOR_OUTPUTS").is_err());
}

#[test]
fn a_bad_value_names_the_variable_the_key_and_what_was_expected() {
    for (name, value, expected) in [
        (
            "SERVER_MAX_STREAMS",
            "65536",
            "server.max_streams: found \"65536\", expected a whole number from 0 to 65535",
        ),
        ("SERVER_DEV", "1", "server.dev: found \"1\", expected true or false"),
        ("SERVER_DRAIN", "30", "server.drain: found \"30\", expected a duration with its unit"),
        ("SERVER_GRPC_ADDRESS", "9090", "server.grpc_address: found \"9090\", expected an address as :50051"),
        ("LOG_LEVEL", "loud", "log_level: found \"loud\", expected one of debug, info"),
        ("LABELS", "rack", "labels: found \"rack\", expected name=value pairs, as rack=r7,disk=ssd"),
        ("LABELS", "a=1,a=2", "labels: \"a\" is given twice"),
        ("WEIGHTS", "1,x", "weights[1]: found \"x\", expected a whole number from -128 to 127"),
        ("WEIGHTS", "1,,2", "weights: found \"1,,2\", which has an empty item"),
        ("RATIO", "inf", "ratio: found \"inf\", expected a number, as 1.5"),
        ("CACHE", "512M", "cache: found \"512M\", expected a size in bytes"),
    ] {
        let name = format!("HYPERVISOR_{name}");
        let message = refusal(&[(&name, value)]);
        assert!(message.starts_with(&format!("environment {name}: {expected}")), "{message}");
    }
}

#[test]
fn a_bad_flag_is_named_and_its_text_is_cut_to_a_bound() {
    let error = Sources::new()
        .flag("server.drain", "--drain", Some("é".repeat(10_000_000)))
        .load::<Settings>()
        .map(|loaded| loaded.value)
        .unwrap_err()
        .to_string();
    assert!(error.starts_with("flag --drain: server.drain: found \"éé"), "{error}");
    assert!(error.len() < 500 && error.contains("(20000000 bytes)"), "{error}");
}

#[test]
fn a_flag_for_a_key_that_does_not_exist_is_a_mistake_of_the_program() {
    let error = Sources::new().flag("server.nope", "--nope", Some(1)).load::<Settings>().map(|l| l.value);
    assert!(matches!(error, Err(ConfigError::UnusableSettings { .. })), "{error:?}");
}

#[test]
fn keys_that_share_a_variable_are_a_mistake_of_the_program() {
    #[derive(Debug, Default, Serialize, Deserialize)]
    struct Inner {
        b_c: u8,
        c: u8,
    }
    #[derive(Debug, Default, Serialize, Deserialize)]
    struct Ambiguous {
        a: Inner,
        a_b: Inner,
    }
    let error = Sources::new().load::<Ambiguous>().map(|loaded| loaded.value).unwrap_err().to_string();
    assert!(error.contains("\"a.b_c\" and \"a_b.c\" share the variable HYPERVISOR_A_B_C"), "{error}");
}

#[test]
fn a_secret_is_read_but_never_shown() {
    let loaded = from_environment(&[("HYPERVISOR_ETCD_PASSWORD", "hunter2")]).unwrap();
    assert_eq!(loaded.value.etcd.password.reveal(), "hunter2");
    let json = serde_json::to_string(&loaded.value).unwrap();
    for shown in [format!("{loaded:?}"), loaded.to_table(), json, loaded.value.etcd.password.to_string()] {
        assert!(shown.contains("***") && !shown.contains("hunter2"), "{shown}");
    }
}

#[test]
fn a_default_secret_survives_when_nobody_sets_it() {
    #[derive(Debug, Serialize, Deserialize)]
    #[serde(default)]
    struct Login {
        password: hv_config::Secret,
    }
    impl Default for Login {
        fn default() -> Self {
            Self { password: "built-in".into() }
        }
    }
    let loaded: Loaded<Login> = Sources::new().load().unwrap();
    assert_eq!(loaded.value.password.reveal(), "built-in");
    assert_eq!(loaded.show()[0].value, "***");
}

#[test]
fn a_refused_combination_names_the_place_of_the_key() {
    let loaded = from_environment(&[("HYPERVISOR_SERVER_DEV", "true")]).unwrap();
    let error = loaded.refuse("server.dev", "found true, expected false beside etcd.endpoints");
    assert_eq!(
        error.to_string(),
        "environment HYPERVISOR_SERVER_DEV: server.dev: found true, expected false beside etcd.endpoints"
    );
}

#[test]
fn the_table_has_a_line_for_every_key() {
    let loaded = from_environment(&[("HYPERVISOR_LABELS", "a=b")]).unwrap();
    let table = loaded.to_table();
    assert_eq!(table.lines().count(), loaded.show().len() + 1);
    let line = table.lines().find(|line| line.starts_with("labels")).unwrap();
    assert!(line.contains("{a: b}") && line.ends_with("environment HYPERVISOR_LABELS"), "{line}");
}

#[cfg(unix)]
#[test]
fn a_variable_that_is_not_utf8_is_refused() {
    use std::ffi::OsString;
    use std::os::unix::ffi::OsStringExt;

    let load = |name: &[u8]| {
        let name = OsString::from_vec(name.to_vec());
        Sources::new().environment([(name, OsString::from_vec(vec![0xff]))]).load::<Settings>()
    };
    let error = load(b"HYPERVISOR_NODE_ID").map(|loaded| loaded.value).unwrap_err().to_string();
    assert!(error.contains("not UTF-8"), "{error}");
    assert!(load(b"HYPERVISOR_\xff").is_err());
    assert!(load(b"\xff").is_ok());
}

proptest! {
    #[test]
    fn any_variable_and_value_is_read_or_refused(name in "[A-Z_]{0,20}|SERVER_DRAIN|LABELS|WEIGHTS|CACHE", value in "\\PC*") {
        if let Err(error) = from_environment(&[(&format!("HYPERVISOR_{name}"), &value)]) {
            prop_assert!(error.to_string().starts_with("environment"));
        }
    }

    #[test]
    fn what_is_set_is_what_is_shown(ip: std::net::IpAddr, port: u16, streams: u16, seconds in 0..100_000_u64) {
        let address = std::net::SocketAddr::new(ip, port);
        let loaded = from_environment(&[
            ("HYPERVISOR_SERVER_GRPC_ADDRESS", &address.to_string()),
            ("HYPERVISOR_SERVER_MAX_STREAMS", &streams.to_string()),
            ("HYPERVISOR_SERVER_DRAIN", &format!("{seconds}s")),
        ]).unwrap();
        prop_assert_eq!(loaded.value.server.grpc_address.resolve().unwrap(), vec![address]);
        prop_assert_eq!(loaded.value.server.max_streams, streams);
        prop_assert_eq!(loaded.value.server.drain.get().as_secs(), seconds);
    }
}
