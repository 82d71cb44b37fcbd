//! Moving idle VMs' memory out.

use clap::{Args, ValueEnum};

use super::value::{ReferenceWord, duration_ms};
use crate::api::types::{SwapChoice, SwapMode, SwapPolicy};

pub(super) const SWAP_OUT_HELP: &str = "\
The VM stands still until something wakes it: a packet for it, `hearth vm exec` or `console`, \
`hearth vm wake`, or the time given here. What was sent to it meanwhile waits, and reaches it in order.

  page        its memory goes to the host's swap; it is back within milliseconds
  hibernate   all of it goes to an encrypted file and its process ends; its addresses stay. Streams into it end

Examples:
  hearth vm swap-out web --mode page
  hearth vm swap-out web --mode hibernate --wake-after 8h";

pub(super) const SWAP_POLICY_HELP: &str = "\
Examples:
  hearth vm swap-policy web --mode page                     when the host is short of memory
  hearth vm swap-policy web --mode hibernate --idle 10m     also when it did nothing for ten minutes
  hearth vm swap-policy web --mode never";

/// `hearth vm swap-out`.
#[derive(Debug, Clone, Args)]
pub struct SwapOutArgs {
    /// Id of the VM, a unique prefix of it, or its name
    pub vm: ReferenceWord,
    /// Where its memory goes
    #[arg(long, value_enum)]
    pub mode: SwapModeWord,
    /// Wake it after this long: seconds, or with s, m or h behind the number
    #[arg(long, value_name = "TIME", value_parser = duration_ms)]
    pub wake_after: Option<u32>,
}

/// `hearth vm swap-policy`.
#[derive(Debug, Clone, Args)]
pub struct SwapPolicyArgs {
    /// Id of the VM, a unique prefix of it, or its name
    pub vm: ReferenceWord,
    /// The policy
    #[command(flatten)]
    pub policy: SwapPolicyWords,
}

/// When a VM's memory is moved out without being asked for.
#[derive(Debug, Clone, Args)]
pub struct SwapPolicyWords {
    /// Where its memory goes when the host is short of it
    #[arg(id = "swap_mode", long = "mode", value_name = "MODE", value_enum)]
    pub mode: SwapChoiceWord,
    /// Move it out after this long without anything to do, even if the host has enough memory
    #[arg(id = "swap_idle", long = "idle", value_name = "TIME", value_parser = duration_ms)]
    pub idle: Option<u32>,
    /// 0 to 255: VMs with less go first [default: 100]
    #[arg(id = "swap_priority", long = "priority", value_name = "N")]
    pub priority: Option<u8>,
}

impl From<SwapPolicyWords> for SwapPolicy {
    fn from(words: SwapPolicyWords) -> Self {
        let SwapPolicyWords { mode, idle, priority } = words;
        Self { mode: mode.into(), idle_s: idle.map(whole_seconds), priority, ..Self::default() }
    }
}

/// Not less than was said.
pub(crate) const fn whole_seconds(milliseconds: u32) -> u32 {
    milliseconds.div_ceil(1000)
}

/// Where memory goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum SwapModeWord {
    /// The host's swap
    Page,
    /// An encrypted file
    Hibernate,
}

impl From<SwapModeWord> for SwapMode {
    fn from(word: SwapModeWord) -> Self {
        match word {
            SwapModeWord::Page => Self::Page,
            SwapModeWord::Hibernate => Self::Hibernate,
        }
    }
}

/// Where memory may go.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum SwapChoiceWord {
    /// Nowhere, unless somebody asks for it
    Never,
    /// The host's swap
    Page,
    /// An encrypted file
    Hibernate,
}

impl From<SwapChoiceWord> for SwapChoice {
    fn from(word: SwapChoiceWord) -> Self {
        match word {
            SwapChoiceWord::Never => Self::Never,
            SwapChoiceWord::Page => Self::Page,
            SwapChoiceWord::Hibernate => Self::Hibernate,
        }
    }
}
