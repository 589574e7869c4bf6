//! The kernel's command line.
//!
//! Linux takes what follows `init=` from the command line, hands `NAME=value` words that it does not know to the first
//! process as environment, and what follows `--` as arguments (Documentation/admin-guide/kernel-parameters.rst). Double
//! quotes keep spaces together; there is no way to write a double quote itself.

use hv_types::InstanceSpec;
use hv_types::instance::spec::MAX_KERNEL_ARGS_BYTES;

/// What a Linux guest of Firecracker is told: where its console is, and that there is nothing to reset or probe.
const DEFAULT: &str = "console=ttyS0 reboot=k panic=1 pci=off";

/// What a root file system runs as its first process.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Process {
    pub(crate) command: Vec<String>,
    pub(crate) env: Vec<String>,
    pub(crate) working_dir: String,
}

/// What runs: the image's own, changed as the specification says. `None`: what the kernel finds by itself.
pub(crate) fn process_of(
    spec: &InstanceSpec,
    image: Option<Process>,
    has_disk: bool,
) -> Result<Option<Process>, String> {
    let asks = !spec.command.is_empty() || !spec.args.is_empty() || !spec.env.is_empty();
    if !asks && image.is_none() {
        return Ok(None);
    }
    if asks && !has_disk {
        return Err(
            "spec.command, spec.args and spec.env need a root drive, and the image is a kernel alone; \
                    use spec.kernel_args"
                .to_owned(),
        );
    }
    let mut process = image.unwrap_or_default();
    if !spec.command.is_empty() {
        process.command.clone_from(&spec.command);
    }
    process.command.extend(spec.args.iter().cloned());
    process.env.extend(spec.env.iter().map(|(name, value)| format!("{name}={value}")));
    if !spec.working_dir.is_empty() {
        process.working_dir.clone_from(&spec.working_dir);
    }
    if process.command.is_empty() && asks {
        return Err("spec.args and spec.env need spec.command, because the image has no command".to_owned());
    }
    if !matches!(process.working_dir.as_str(), "" | "/") {
        return Err(format!(
            "spec.working_dir: the kernel starts its first process in `/`, not in `{}`; name a command that changes to it",
            process.working_dir
        ));
    }
    Ok((!process.command.is_empty()).then_some(process))
}

/// The whole line.
pub(crate) fn line(image: &str, added: &str, process: Option<&Process>) -> Result<String, String> {
    let mut words = vec![if image.is_empty() { DEFAULT } else { image }.to_owned(), added.to_owned()];
    if let Some(process) = process {
        let (program, arguments) = process.command.split_first().ok_or("spec.command: it is empty")?;
        words.push(format!("init={}", quoted(program)?));
        for variable in &process.env {
            let (name, value) = variable.split_once('=').unwrap_or((variable, ""));
            words.push(format!("{name}={}", quoted(value)?));
        }
        if !arguments.is_empty() {
            words.push("--".to_owned());
        }
        for argument in arguments {
            words.push(quoted(argument)?);
        }
    }
    words.retain(|word| !word.is_empty());
    let line = words.join(" ");
    if line.len() > MAX_KERNEL_ARGS_BYTES {
        return Err(format!(
            "spec.kernel_args: the command line has {} bytes with the image's own and the command; at most {MAX_KERNEL_ARGS_BYTES}",
            line.len()
        ));
    }
    // Firecracker takes printable ASCII only.
    match line.bytes().all(|byte| (b' '..=b'~').contains(&byte)) {
        true => Ok(line),
        false => Err("spec.kernel_args: a kernel's command line takes printable ASCII only".to_owned()),
    }
}

/// The line after a change of what was added to it: the image's own part and the command stay.
pub(crate) fn changed(line: &str, old: &InstanceSpec, new: &InstanceSpec) -> String {
    let (was, is) = (old.kernel_args.trim(), new.kernel_args.trim());
    if was == is {
        return line.to_owned();
    }
    let line = match was.is_empty() {
        // Before what the first process is told, which goes to the end.
        true => line
            .split_once(" init=")
            .map_or(format!("{line} {is}"), |(own, rest)| format!("{own} {is} init={rest}")),
        false => line.replacen(was, is, 1),
    };
    line.trim().to_owned()
}

fn quoted(word: &str) -> Result<String, String> {
    match word {
        _ if word.contains('"') => Err(format!(
            "spec.command: `{word}` has a double quote, which a kernel's command line cannot carry"
        )),
        _ if word.is_empty() || word.contains(' ') => Ok(format!("\"{word}\"")),
        _ => Ok(word.to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn process(command: &[&str], env: &[&str]) -> Process {
        let words = |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect();
        Process { command: words(command), env: words(env), working_dir: String::new() }
    }

    #[test]
    fn a_command_becomes_the_first_process() {
        let cases = [
            (None, "console=ttyS0 reboot=k panic=1 pci=off quiet"),
            (Some(process(&["/init"], &[])), "console=ttyS0 reboot=k panic=1 pci=off quiet init=/init"),
            (
                Some(process(&["/bin/sh", "-c", "echo a b"], &["A=1", "B=x y", "C="])),
                "console=ttyS0 reboot=k panic=1 pci=off quiet init=/bin/sh A=1 B=\"x y\" C=\"\" -- -c \"echo a b\"",
            ),
        ];
        for (process, expected) in cases {
            assert_eq!(line("", "quiet", process.as_ref()).unwrap(), expected);
        }
        assert_eq!(line("own=1", "", None).unwrap(), "own=1");
    }

    #[test]
    fn what_was_added_can_be_changed() {
        let with =
            |kernel_args: &str| InstanceSpec { kernel_args: kernel_args.into(), ..InstanceSpec::default() };
        let cases = [
            ("own quiet init=/x", "quiet", "loud", "own loud init=/x"),
            ("own init=/x -- a", "", "quiet", "own quiet init=/x -- a"),
            ("own", "", "quiet", "own quiet"),
            ("own quiet", "quiet", "", "own"),
            ("own quiet", "quiet", "quiet", "own quiet"),
        ];
        for (line, was, is, expected) in cases {
            assert_eq!(changed(line, &with(was), &with(is)), expected);
        }
    }

    #[test]
    fn what_the_kernel_cannot_carry_is_refused() {
        for command in [["/bin/sh", "say \"x\""], ["/bin/ü", ""], ["/x", &"y".repeat(3000)]] {
            line("", "", Some(&process(&command, &[]))).unwrap_err();
        }
        let spec = InstanceSpec { command: vec!["sh".into()], ..InstanceSpec::default() };
        assert!(process_of(&spec, None, false).unwrap_err().contains("root drive"));
        let spec = InstanceSpec { working_dir: "/srv".into(), ..spec };
        assert!(process_of(&spec, None, true).unwrap_err().contains("working_dir"));
    }
}
