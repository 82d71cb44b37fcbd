//! The kernel's command line, as far as it is not the machine's own: words of the host, of the image, and of what is to run in
//! the guest. Pure.

/// What programs linked to glibc have to be told where guests' kernel mode is emulated: the kernel saves no wide registers
/// there, and so nobody may use them (`guest/kernel/README.md`). PID 1 hands it to all programs.
const GLIBC_WORDS: &str =
    "GLIBC_TUNABLES=glibc.cpu.hwcaps=-AVX,-AVX2,-AVX512F,-AVX512VL,-AVX512BW,-XSAVE,-XSAVEC,-ERMS";

/// The kernel's command line, but for the words that announce devices. Where kernels need words of the host, what runs on
/// a root of its own needs some as well.
pub(super) fn command_line(host_additions: &str, image: &str, has_root: bool) -> String {
    let glibc = if has_root && !host_additions.trim().is_empty() { glibc_words(image) } else { None };
    let words = ["console=ttyS0", host_additions.trim(), image.trim(), glibc.unwrap_or_default()];
    words.into_iter().filter(|word| !word.is_empty()).collect::<Vec<_>>().join(" ")
}

/// What is to be said to programs linked to glibc beside these words, which may say it already.
pub(super) fn glibc_words(words: &str) -> Option<&'static str> {
    let glibc = GLIBC_WORDS.split_once('=').map_or(GLIBC_WORDS, |(name, _)| name);
    let is_said = words.split_ascii_whitespace().any(|word| word.starts_with(glibc));
    (!is_said).then_some(GLIBC_WORDS)
}

#[cfg(test)]
mod tests {
    use super::command_line;

    #[test]
    fn the_command_line_has_one_blank_between_its_parts() {
        assert_eq!(command_line("", "", false), "console=ttyS0");
        assert_eq!(command_line(" no_x ", "quiet  panic=-1", false), "console=ttyS0 no_x quiet  panic=-1");
    }

    #[test]
    fn programs_of_a_volume_are_told_what_their_host_lacks() {
        assert_eq!(command_line("", "quiet", true), "console=ttyS0 quiet");
        let line = command_line("no_x", "quiet", true);
        assert!(line.starts_with("console=ttyS0 no_x quiet GLIBC_TUNABLES=glibc.cpu.hwcaps=-AVX"), "{line}");
        assert_eq!(command_line("no_x", "GLIBC_TUNABLES=y", true), "console=ttyS0 no_x GLIBC_TUNABLES=y");
    }
}
