//! The configuration file: where a mistake is, what it is, and that nothing makes the reader fall over.

use std::fs;

use hv_config::{ConfigError, Sources};
use proptest::prelude::*;

use crate::settings::{Driver, Settings};

fn load(text: &str) -> Result<Settings, ConfigError> {
    Sources::new().text("server.yaml", text).load().map(|loaded| loaded.value)
}

fn refusal(text: &str) -> String {
    load(text).expect_err("the file is bad").to_string()
}

#[test]
fn a_whole_file_is_read() {
    let settings = load(
        "# comment\nlog_level: debug\nserver:\n  grpc_address: \":9\"\n  dev: true\nlabels:\n  rack: r7\n  1: one\n\
         node_id: 12\nweights: [1, 2]\ndrivers:\n- name: qemu\n  slots: 3\n- name: fake\n",
    )
    .unwrap();
    assert_eq!(settings.server.grpc_address.port(), 9);
    assert_eq!(settings.labels["1"], "one");
    assert_eq!(settings.node_id.as_deref(), Some("12"));
    assert_eq!(settings.drivers[0], Driver { name: "qemu".to_owned(), slots: 3 });
    assert_eq!(settings.drivers[1].slots, 0);
}

#[test]
fn an_empty_file_and_empty_sections_change_nothing() {
    for text in ["", "# nothing\n", "---\n", "server:\n", "labels:\nnode_id:\n", "{}"] {
        assert_eq!(load(text).unwrap(), Settings::default(), "{text:?}");
    }
}

#[test]
fn an_unknown_key_names_its_line_and_the_nearest_key() {
    for (text, expected) in [
        (
            "server:\n  grpc_adress: :1\n",
            "server.yaml:2: unknown key \"server.grpc_adress\", did you mean \"server.grpc_address\"?",
        ),
        (
            "\ngrpc_address: :1\n",
            "server.yaml:2: unknown key \"grpc_address\", did you mean \"server.grpc_address\"?",
        ),
        ("loglevel: info\n", "server.yaml:1: unknown key \"loglevel\", did you mean \"log_level\"?"),
        (
            "server:\n  xyzzy: 1\n",
            "server.yaml:2: unknown key \"server.xyzzy\", expected server.grpc_address, server.max_streams, ",
        ),
        (
            "drivers:\n- name: a\n  slot: 1\n",
            "server.yaml:3: unknown key \"drivers[0].slot\", did you mean \"slots\"?",
        ),
    ] {
        let message = refusal(text);
        assert!(message.starts_with(expected), "{message}");
    }
}

#[test]
fn a_bad_value_names_its_line_its_key_and_what_was_expected() {
    for (text, expected) in [
        (
            "server:\n  max_streams: many\n",
            "server.yaml:2: server.max_streams: found \"many\", expected a whole number from 0 to 65535",
        ),
        (
            "server: 5\n",
            "server.yaml:1: server: found \"5\", expected a section with the keys grpc_address, max_streams, dev, drain",
        ),
        ("server: [a]\n", "server.yaml:1: server: found a list, expected a section"),
        ("server:\n  drain:\n", "server.yaml:2: server.drain: found nothing, expected a duration"),
        ("server:\n  dev: yes\n", "server.yaml:2: server.dev: found \"yes\", expected true or false"),
        ("weights: 1\n", "server.yaml:1: weights: found \"1\", expected a list, as [a, b]"),
        ("weights:\n- 1\n- x\n", "server.yaml:3: weights[1]: found \"x\""),
        (
            "labels: a=b\n",
            "server.yaml:1: labels: found \"a=b\", expected names with values, as {rack: r7, disk: ssd}",
        ),
        ("labels:\n  a: [b]\n", "server.yaml:2: labels.a: found a list, expected a string"),
        ("drivers:\n- slots: 1\n", "server.yaml:2: drivers[0]: the key \"name\" is missing"),
        ("cache: 1 GB\n", "server.yaml:1: cache: found \"1 GB\", expected a size in bytes"),
        ("just text\n", "server.yaml:1: the file: found \"just text\", expected keys with values"),
    ] {
        let message = refusal(text);
        assert!(message.starts_with(expected), "{message}");
    }
}

#[test]
fn half_written_yaml_names_the_line_and_what_is_wrong() {
    for (text, line) in [
        ("server:\n  grpc_address: \":9090\n", 2),
        ("weights: [1, 2\nlog_level: info\n", 1),
        ("server:\n  dev: true\n dev: false\n", 3),
        ("server: {dev: true\n", 1),
        ("log_level info\nserver:\n", 1),
        ("a: b: c\n", 1),
        ("server:\n\tdev: true\n", 2),
    ] {
        let message = refusal(text);
        let rest = message.strip_prefix("server.yaml:").unwrap_or_else(|| panic!("{message}"));
        let reported: usize = rest.split(':').next().unwrap().parse().unwrap();
        // A parser notices an open bracket or quote only where the text stops making sense.
        assert!((line..=line + 2).contains(&reported), "{text:?}: {message}");
        assert!(message.len() > "server.yaml:1:1: ".len() + 10, "{message}");
    }
}

#[test]
fn what_settings_have_no_use_for_is_refused() {
    for (text, expected) in [
        ("log_level: &a info\n", "anchors are not supported"),
        ("log_level: !!str info\n", "tags are not supported"),
        (
            "log_level: info\nlog_level: debug\n",
            "server.yaml:2:1: the key \"log_level\" stands here again, first on line 1",
        ),
        ("log_level: info\n---\nlog_level: info\n", "a second document begins here"),
        ("[a]: b\n", "found a list as a key"),
    ] {
        let message = refusal(text);
        assert!(message.contains(expected), "{message}");
    }
}

#[test]
fn a_deeply_nested_file_is_refused() {
    for text in [format!("labels: {}", "[".repeat(100_000)), "- ".repeat(100_000), "{a: ".repeat(100_000)] {
        assert!(refusal(&text).starts_with("server.yaml:1:"));
    }
}

#[test]
fn a_missing_file_is_an_error_only_where_the_user_named_it() {
    let directory = tempfile::tempdir().unwrap();
    let missing = directory.path().join("none.yaml");
    let error =
        Sources::new().file(Some(&missing)).load::<Settings>().map(|loaded| loaded.value).unwrap_err();
    assert!(error.to_string().contains(missing.to_str().unwrap()), "{error}");
    assert!(matches!(error, ConfigError::ReadFile { .. }));
    assert!(Sources::new().file(None::<&str>).fallback_file(&missing).load::<Settings>().is_ok());
    assert!(Sources::new().fallback_file(directory.path()).load::<Settings>().is_err());
}

#[test]
fn a_file_is_read_from_disk_and_its_path_is_the_origin() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("agent.yaml");
    fs::write(&path, "log_level: debug\n").unwrap();
    let loaded = Sources::new().fallback_file(&path).load::<Settings>().unwrap();
    assert_eq!(loaded.origin("log_level").to_string(), format!("file {}:1", path.display()));
}

#[test]
fn a_file_over_the_limit_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("large.yaml");
    let limit = usize::try_from(hv_config::MAX_FILE_BYTES).unwrap();
    fs::write(&path, "#".repeat(limit)).unwrap();
    assert!(Sources::new().file(Some(&path)).load::<Settings>().is_ok());
    fs::write(&path, "#".repeat(limit + 1)).unwrap();
    let error = Sources::new().file(Some(&path)).load::<Settings>().map(|loaded| loaded.value).unwrap_err();
    assert!(error.to_string().contains("larger than 1048576 bytes"), "{error}");
}

#[test]
fn a_file_that_is_not_text_names_the_line() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("binary.yaml");
    fs::write(&path, b"log_level: info\nnode_id: \xff\n").unwrap();
    let error = Sources::new().file(Some(&path)).load::<Settings>().map(|loaded| loaded.value).unwrap_err();
    assert!(error.to_string().contains("binary.yaml:2:10: found bytes that are not UTF-8"), "{error}");
}

proptest! {
    #[test]
    fn any_text_is_read_or_refused(text in "\\PC*|[ -~\n\t]*") {
        let _ = load(&text);
        let _ = hv_config::keys_of_yaml(&text);
    }

    #[test]
    fn any_yaml_like_text_is_read_or_refused(
        parts in prop::collection::vec(prop::sample::select(vec![
            "server", ":", ": ", "\n", "  ", "- ", "[", "]", "{", "}", ",", "\"", "'", "|", ">", "&a ", "*a", "!t ",
            "---\n", "...\n", "#", "labels", "drivers", "name", "é", "\t", "null", "1", "? ", "%YAML 1.2\n", "\u{feff}",
        ]), 0..60),
    ) {
        if let Err(error) = load(&parts.concat()) {
            prop_assert!(error.to_string().starts_with("server.yaml:"), "{}", error);
        }
    }

    #[test]
    fn every_label_reads_back(labels in prop::collection::btree_map("[a-z]{1,8}", "\\PC{0,12}", 0..8)) {
        // JSON is YAML, and quotes anything.
        let text = format!("labels: {}", serde_json::to_string(&labels).unwrap());
        prop_assert_eq!(load(&text).unwrap().labels, labels);
    }
}
