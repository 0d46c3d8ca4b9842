//! What the driver and the agent say to each other over the guest's second serial port.
//!
//! A message is a line `@@ VERB ID STATUS LENGTH` and LENGTH raw bytes. The line can be found again after
//! noise; the length makes any byte fit for a payload.

use std::io;

/// What a message is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verb {
    /// To the agent: run the payload with `sh -c`.
    Run,
    /// To the agent: kill what `Run` with this id started.
    Kill,
    /// To the agent: payload is path, NUL, bytes; status 0 makes the file anew, 1 appends.
    Put,
    /// To the agent: answer the content of the file the payload names.
    Get,
    /// From the agent: it has started.
    Ready,
    /// From the agent: the answer to the request with this id.
    Done,
}

const VERBS: [(Verb, &str); 6] = [
    (Verb::Run, "run"),
    (Verb::Kill, "kill"),
    (Verb::Put, "put"),
    (Verb::Get, "get"),
    (Verb::Ready, "ready"),
    (Verb::Done, "done"),
];

/// A payload above this is a broken header, not a request for memory.
const MAX_LENGTH: usize = 256 << 20;

/// The line before a payload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// What it is about.
    pub verb: Verb,
    /// Ties an answer to its request.
    pub id: u64,
    /// Exit status of a command; 0 elsewhere unless the verb says otherwise.
    pub status: i32,
    /// How many payload bytes follow.
    pub length: usize,
}

impl Header {
    /// Reads a line; `None` for noise.
    pub fn parse(line: &[u8]) -> Option<Self> {
        let line = std::str::from_utf8(line).ok()?;
        // Noise without a newline of its own may stand before a header.
        let (_, fields) = line.split_once("@@ ")?;
        let mut fields = fields.split_ascii_whitespace();
        let name = fields.next()?;
        let (verb, _) = VERBS.iter().find(|(_, text)| *text == name)?;
        let header = Self {
            verb: *verb,
            id: fields.next()?.parse().ok()?,
            status: fields.next()?.parse().ok()?,
            length: fields.next()?.parse().ok()?,
        };
        (fields.next().is_none() && header.length <= MAX_LENGTH).then_some(header)
    }
}

/// A whole message as it goes over the line.
pub fn message(verb: Verb, id: u64, status: i32, payload: &[u8]) -> Vec<u8> {
    let name = VERBS.iter().find(|(known, _)| *known == verb).map_or("", |(_, text)| text);
    let mut bytes = format!("@@ {name} {id} {status} {}\n", payload.len()).into_bytes();
    bytes.extend_from_slice(payload);
    bytes
}

/// The next message; `None` at the end of the stream.
pub fn read(input: &mut impl io::BufRead) -> io::Result<Option<(Header, Vec<u8>)>> {
    loop {
        let mut line = Vec::new();
        if input.read_until(b'\n', &mut line)? == 0 {
            return Ok(None);
        }
        if let Some(header) = Header::parse(&line) {
            let mut payload = vec![0; header.length];
            input.read_exact(&mut payload)?;
            return Ok(Some((header, payload)));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_survive_noise_before_them() {
        let mut stream = b"SeaBIOS\r\nno newline".to_vec();
        stream.extend(message(Verb::Done, 7, -1, b"@@ run\n\0\xff"));
        stream.extend(message(Verb::Ready, 0, 0, b""));
        let mut input = stream.as_slice();
        let (header, payload) = read(&mut input).unwrap().unwrap();
        assert_eq!((header.verb, header.id, header.status), (Verb::Done, 7, -1));
        assert_eq!(payload, b"@@ run\n\0\xff");
        assert_eq!(read(&mut input).unwrap().unwrap().0.verb, Verb::Ready);
        assert!(read(&mut input).unwrap().is_none());
    }

    #[test]
    fn broken_headers_are_noise() {
        for line in ["@@ run 1 0", "@@ fly 1 0 0", "@@ run 1 0 99999999999", "@@ run 1 0 0 0", "@@ run x 0 0"]
        {
            assert_eq!(Header::parse(line.as_bytes()), None, "{line}");
        }
    }
}
