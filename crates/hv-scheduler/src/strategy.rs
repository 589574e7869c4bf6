//! Which of the nodes that fit are preferred.

use std::str::FromStr;

use hv_types::Invalid;

/// How to choose among nodes that fit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Strategy {
    /// The fullest: keeps whole nodes free for large instances.
    BinPack,
    /// The emptiest: a node that fails takes the least with it.
    #[default]
    Spread,
}

impl FromStr for Strategy {
    type Err = Invalid;

    fn from_str(text: &str) -> Result<Self, Invalid> {
        match text {
            "bin-pack" => Ok(Self::BinPack),
            "spread" => Ok(Self::Spread),
            _ => Err(Invalid::new("scheduler.strategy", text, "must be `bin-pack` or `spread`")),
        }
    }
}

impl std::fmt::Display for Strategy {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::BinPack => "bin-pack",
            Self::Spread => "spread",
        })
    }
}
