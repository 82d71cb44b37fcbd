//! The little JSON that guests speak: one flat object on a line.
//!
//! What is written has strings only. The reader knows members that are strings, numbers, `true`, `false` and `null`,
//! gives the one that is asked for and reads the others to see that the object is one. Nothing is nested, so nothing
//! recurses, and what is kept is never more than what was read.

use alloc::string::String;
use alloc::vec::Vec;

/// Appends an object of strings. The names are written as they are.
pub fn push_object(to: &mut Vec<u8>, members: &[(&str, &str)]) {
    let mut before = b'{';
    for (name, value) in members {
        to.extend_from_slice(&[before, b'"']);
        to.extend_from_slice(name.as_bytes());
        to.extend_from_slice(b"\":\"");
        push_escaped(to, value);
        to.push(b'"');
        before = b',';
    }
    to.push(b'}');
}

/// Appends the inside of a string.
fn push_escaped(to: &mut Vec<u8>, text: &str) {
    for byte in text.bytes() {
        match byte {
            b'"' | b'\\' => to.extend_from_slice(&[b'\\', byte]),
            0..0x20 => {
                let [high, low] = hex_digits(byte);
                to.extend_from_slice(&[b'\\', b'u', b'0', b'0', high, low]);
            }
            _ => to.push(byte),
        }
    }
}

/// Bytes as lower-case hexadecimal digits.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().flat_map(|byte| hex_digits(*byte)).map(char::from).collect()
}

fn hex_digits(byte: u8) -> [u8; 2] {
    [byte >> 4, byte & 0xf].map(|digit| if digit < 10 { b'0' + digit } else { b'a' - 10 + digit })
}

/// A member's value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Value<'a> {
    /// A string, without its escapes.
    Text(String),
    /// A number or one of the three names, as it is written.
    Bare(&'a [u8]),
}

/// The member `wanted` of the object that `text` is, the first of that name. `None` when there is none, or when the
/// text is not one flat object.
pub fn member<'a>(text: &'a [u8], wanted: &str) -> Option<Value<'a>> {
    let mut reader = Reader { rest: text };
    let mut found = None;
    reader.take(b'{')?;
    // An empty object has no member that could be wanted.
    loop {
        reader.take(b'"')?;
        let name = reader.string()?;
        reader.take(b':')?;
        let value = if reader.take(b'"').is_some() { Value::Text(reader.string()?) } else { reader.bare()? };
        if found.is_none() && name == wanted {
            found = Some(value);
        }
        if reader.take(b',').is_none() {
            break;
        }
    }
    reader.take(b'}')?;
    reader.rest.trim_ascii().is_empty().then_some(found)?
}

/// What is not read yet. Bytes and not characters: cutting text brings along what says that it was cut within a character,
/// which is kilobytes of a guest's agent.
struct Reader<'a> {
    rest: &'a [u8],
}

impl<'a> Reader<'a> {
    /// Passes over blanks and this character.
    fn take(&mut self, character: u8) -> Option<()> {
        let (first, rest) = self.rest.trim_ascii_start().split_first()?;
        if *first != character {
            return None;
        }
        self.rest = rest;
        Some(())
    }

    fn next(&mut self) -> Option<u8> {
        let (next, rest) = self.rest.split_first()?;
        self.rest = rest;
        Some(*next)
    }

    /// The rest of a string, whose opening quotation mark is passed.
    fn string(&mut self) -> Option<String> {
        let mut text = Vec::new();
        loop {
            match self.next()? {
                b'"' => return String::from_utf8(text).ok(),
                b'\\' => text.extend_from_slice(self.escaped()?.encode_utf8(&mut [0; 4]).as_bytes()),
                0..0x20 => return None,
                plain => text.push(plain),
            }
        }
    }

    fn escaped(&mut self) -> Option<char> {
        match self.next()? {
            same @ (b'"' | b'\\' | b'/') => Some(char::from(same)),
            b'b' => Some('\u{8}'),
            b'f' => Some('\u{c}'),
            b'n' => Some('\n'),
            b'r' => Some('\r'),
            b't' => Some('\t'),
            b'u' => {
                let mut number = 0;
                for _ in 0..4 {
                    number = number << 4 | char::from(self.next()?).to_digit(16)?;
                }
                // Halves of a pair: the words are for people, who see that something was there.
                Some(char::from_u32(number).unwrap_or(char::REPLACEMENT_CHARACTER))
            }
            _ => None,
        }
    }

    /// A number or a name.
    fn bare(&mut self) -> Option<Value<'a>> {
        let text = self.rest.trim_ascii_start();
        let end = text.iter().position(|byte| !(byte.is_ascii_alphanumeric() || b"+-.".contains(byte)));
        let (bare, rest) = text.split_at_checked(end.unwrap_or(text.len()))?;
        self.rest = rest;
        let number = bare.first().is_some_and(|byte| *byte == b'-' || byte.is_ascii_digit())
            && bare.iter().all(|byte| byte.is_ascii_digit() || b"+-.eE".contains(byte));
        (number || matches!(bare, b"true" | b"false" | b"null")).then_some(Value::Bare(bare))
    }
}
