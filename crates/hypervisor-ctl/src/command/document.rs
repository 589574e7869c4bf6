//! `completion` and `man`: made from the command tree.

use std::path::Path;

use crate::cli::{self, CompletionArgs, ManArgs};
use crate::error::{CtlError, exit_code};
use crate::output::write_stdout;

/// The program's name, as it is typed.
const NAME: &str = "hypervisor-ctl";

pub(crate) fn completion(args: &CompletionArgs) -> Result<u8, CtlError> {
    let mut script = Vec::new();
    clap_complete::generate(
        args.shell,
        &mut <cli::Cli as clap::CommandFactory>::command(),
        NAME,
        &mut script,
    );
    write_stdout(&script)?;
    Ok(exit_code::OK)
}

pub(crate) fn man(args: &ManArgs) -> Result<u8, CtlError> {
    let root = cli::command();
    let Some(directory) = &args.dir else {
        write_stdout(&page(&root, NAME)?)?;
        return Ok(exit_code::OK);
    };
    let failed = |source| CtlError::File { action: "create", path: directory.clone(), source };
    std::fs::create_dir_all(directory).map_err(failed)?;
    pages(&root, NAME, directory)?;
    Ok(exit_code::OK)
}

fn pages(command: &clap::Command, name: &str, directory: &Path) -> Result<(), CtlError> {
    let path = directory.join(format!("{name}.1"));
    std::fs::write(&path, page(command, name)?).map_err(|source| CtlError::File {
        action: "write",
        path: path.clone(),
        source,
    })?;
    for child in command.get_subcommands().filter(|child| !child.is_hide_set() && child.get_name() != "help")
    {
        pages(child, &format!("{name}-{}", child.get_name()), directory)?;
    }
    Ok(())
}

fn page(command: &clap::Command, name: &str) -> Result<Vec<u8>, CtlError> {
    let mut page = Vec::new();
    let man = clap_mangen::Man::new(command.clone().name(name.to_owned())).title(name.to_uppercase());
    man.render(&mut page).map_err(|source| CtlError::Stream { action: "render the manual page", source })?;
    Ok(page)
}
