//! Floor 1: the kernel's interfaces, one file per subject. The only unsafe code of the crate; safe functions out;
//! no policy and no logging.

pub mod cgroup;
pub mod discard;
pub mod entropy;
pub mod extent;
pub mod fd;
pub mod file;
pub mod fill;
pub mod host;
pub mod jail;
pub mod kvm;
pub mod landlock;
pub mod netconf;
pub mod netlink;
pub mod netns;
pub mod nft;
pub mod pagemap;
pub mod pageout;
pub mod process;
pub mod ram;
pub mod signal;
pub mod sock;
pub mod sparse;
pub mod tap;
pub mod thread;
pub mod userfault;
pub mod vectored;
