//! `apply`.

use super::Context;
use crate::cli::ApplyArgs;
use crate::error::CtlError;

pub(super) async fn run(_context: &Context, _args: &ApplyArgs) -> Result<u8, CtlError> {
    Err(CtlError::Usage("unfinished".to_owned()))
}
