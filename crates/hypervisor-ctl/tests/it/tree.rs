//! The command tree: every command parses, is explained, and is in the reference page.

use clap::{Command, CommandFactory};
use hypervisor_ctl::cli::Cli;

use crate::program::alone;

/// Every command of the tree; those under a type are those under `instance`.
const TREE: &str = "\
apply
cluster info
completion
config show
container …
events
image delete
image gc
image inspect
image list
image pull
image push
instance clone
instance console
instance create
instance delete
instance describe
instance exec
instance explain
instance get
instance list
instance logs
instance migrate
instance pause
instance rename
instance rescue
instance restart
instance resume
instance snapshot create
instance snapshot delete
instance snapshot list
instance snapshot revert
instance start
instance stats
instance stop
instance unrescue
instance update
man
microvm …
node confirm-down
node cordon
node describe
node drain
node get
node hold-failover
node list
node release-failover
node remove
node uncordon
node update
operation cancel
operation get
operation list
operation watch
schedule
store backup
store compact
store dump
store freeze
store migrate
store restore
store status
store unfreeze
version
vm …";

fn leaves(command: &Command, path: &str, found: &mut Vec<(String, Command)>) {
    let children: Vec<&Command> = command
        .get_subcommands()
        .filter(|child| child.get_name() != "help" && !child.is_hide_set())
        .collect();
    if children.is_empty() {
        found.push((path.to_owned(), command.clone()));
    }
    for child in children {
        leaves(child, format!("{path} {}", child.get_name()).trim(), found);
    }
}

#[test]
fn the_tree_is_as_users_know_it() {
    Cli::command().debug_assert();
    let mut found = Vec::new();
    leaves(&Cli::command(), "", &mut found);
    let mut names: Vec<String> = found
        .iter()
        .map(|(path, _)| match path.split_once(' ') {
            Some((noun @ ("vm" | "container" | "microvm"), _)) => format!("{noun} …"),
            _ => path.clone(),
        })
        .collect();
    names.sort();
    names.dedup();
    assert_eq!(names.join("\n"), TREE);
}

#[test]
fn every_command_says_what_it_does_and_every_flag_what_it_means() {
    let mut found = Vec::new();
    leaves(&hypervisor_ctl::cli::command(), "", &mut found);
    for (path, command) in found {
        assert!(command.get_about().is_some(), "{path} has no help");
        for argument in command.get_arguments() {
            assert!(argument.get_help().is_some(), "{path} {argument} has no help");
        }
        let simple =
            ["version", "config show", "node cordon"].contains(&path.as_str()) || path.contains("info");
        assert!(simple || command.get_after_long_help().is_some(), "{path} has no example");
    }
}

#[test]
fn every_example_of_the_help_parses() {
    let mut found = Vec::new();
    leaves(&Cli::command(), "", &mut found);
    found.push((String::new(), Cli::command()));
    let mut count = 0;
    for (path, command) in found {
        let help = command.get_after_long_help().map(ToString::to_string).unwrap_or_default();
        for line in help.replace("\\\n", " ").lines() {
            let Some(start) = line.find("hypervisor-ctl ").filter(|_| line.starts_with("  ")) else {
                continue;
            };
            let line = line[start..].split(" > ").next().unwrap_or_default();
            let line = line.split(" | ").next().unwrap_or_default();
            if line.contains("xargs") || line.contains('`') {
                continue;
            }
            let parsed = Cli::command().try_get_matches_from(words(line));
            assert!(parsed.is_ok(), "{path}: {line}: {}", parsed.unwrap_err());
            count += 1;
        }
    }
    assert!(count > 40, "{count} examples");
}

/// Splits as a shell would, with single quotes only.
fn words(line: &str) -> Vec<String> {
    let mut words = vec![String::new()];
    let mut quoted = false;
    for c in line.trim().chars() {
        match c {
            '\'' => quoted = !quoted,
            ' ' if !quoted => words.push(String::new()),
            _ => words.last_mut().unwrap().push(c),
        }
    }
    words.retain(|word| !word.is_empty());
    words
}

#[test]
fn help_lists_the_exit_codes_and_is_no_error() {
    let help = alone(&["--help"]).ok();
    for part in
        ["Exit codes:", "3  not found", "8  the instance failed", "HYPERVISOR_CTL_SERVER", "instance list"]
    {
        assert!(help.contains(part), "{part}");
    }
    alone(&["vm", "create", "--help"]).ok();
    alone(&[]).failed(2);
    alone(&["frobnicate"]).failed(2);
}

#[test]
fn completions_and_manual_pages_are_made() {
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        assert!(alone(&["completion", shell]).ok().contains("hypervisor-ctl"), "{shell}");
    }
    let directory = tempfile::tempdir().unwrap();
    alone(&["man", "--dir", directory.path().to_str().unwrap()]).ok();
    let page = std::fs::read_to_string(directory.path().join("hypervisor-ctl-instance-create.1")).unwrap();
    assert!(page.contains("hypervisor\\-ctl\\-instance\\-create") || page.contains("memory"), "{page}");
    assert!(alone(&["man"]).ok().contains(".TH"));
}

#[test]
fn the_reference_page_is_up_to_date() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/reference/cli.md");
    let committed = std::fs::read_to_string(path).unwrap_or_default();
    assert!(
        committed == hypervisor_ctl::markdown(),
        "docs/reference/cli.md is stale: hypervisor-ctl docs-markdown > docs/reference/cli.md"
    );
}

#[test]
fn a_reader_that_goes_away_is_no_failure() {
    let mut child = crate::program::command()
        .args(["docs-markdown"])
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{output:?}");
}
