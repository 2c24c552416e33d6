//! Porter's stemmer (1980), with the changes that NLTK makes by default, which `rouge_score` uses.

/// The stem of a word in lower case; other texts come back as they are or nearly so.
///
/// ```
/// assert_eq!(yuan_eval::stem("generalization"), "gener");
/// assert_eq!(yuan_eval::stem("flies"), "fli");
/// assert_eq!(yuan_eval::stem("dies"), "die");
/// ```
pub fn stem(word: &str) -> String {
    if let Some((_, stem)) = IRREGULAR.iter().find(|(forms, _)| forms.contains(&word)) {
        return (*stem).to_owned();
    }
    // Words of two letters have no stem that is shorter.
    if word.len() <= 2 || !word.is_ascii() {
        return word.to_owned();
    }
    let mut word = Word(word.as_bytes().to_vec());
    word.step_1a();
    word.step_1b();
    word.step_1c();
    word.step_2();
    word.step_3();
    word.step_4();
    word.step_5();
    word.0.into_iter().map(char::from).collect()
}

/// Words that the rules would take too far.
const IRREGULAR: [(&[&str], &str); 12] = [
    (&["sky", "skies"], "sky"),
    (&["dying"], "die"),
    (&["lying"], "lie"),
    (&["tying"], "tie"),
    (&["news"], "news"),
    (&["innings", "inning"], "inning"),
    (&["outings", "outing"], "outing"),
    (&["cannings", "canning"], "canning"),
    (&["howe"], "howe"),
    (&["proceed"], "proceed"),
    (&["exceed"], "exceed"),
    (&["succeed"], "succeed"),
];

/// A word on its way to its stem.
struct Word(Vec<u8>);

impl Word {
    fn is_consonant(&self, at: usize) -> bool {
        match self.0[at] {
            b'a' | b'e' | b'i' | b'o' | b'u' => false,
            b'y' => at == 0 || !self.is_consonant(at - 1),
            _ => true,
        }
    }

    /// How often a vowel is followed by a consonant in the first letters: Porter's m.
    fn measure(&self, length: usize) -> usize {
        (1..length).filter(|&at| self.is_consonant(at) && !self.is_consonant(at - 1)).count()
    }

    fn has_vowel(&self, length: usize) -> bool {
        (0..length).any(|at| !self.is_consonant(at))
    }

    fn ends_in_double_consonant(&self) -> bool {
        let length = self.0.len();
        length >= 2 && self.0[length - 1] == self.0[length - 2] && self.is_consonant(length - 1)
    }

    /// Whether the first letters end in consonant, vowel, consonant, and not in w, x or y; or are a
    /// vowel and a consonant.
    fn ends_in_short_syllable(&self, length: usize) -> bool {
        if length == 2 {
            return !self.is_consonant(0) && self.is_consonant(1);
        }
        length >= 3
            && self.is_consonant(length - 3)
            && !self.is_consonant(length - 2)
            && self.is_consonant(length - 1)
            && !matches!(self.0[length - 1], b'w' | b'x' | b'y')
    }

    fn ends_with(&self, ending: &str) -> bool {
        self.0.ends_with(ending.as_bytes())
    }

    fn before(&self, ending: &str) -> usize {
        self.0.len() - ending.len()
    }

    fn replace(&mut self, ending: &str, new: &str) {
        self.0.truncate(self.before(ending));
        self.0.extend(new.as_bytes());
    }

    /// The first rule whose ending the word has decides, whether its condition holds or not.
    fn first_rule(
        &mut self,
        rules: &[(&str, &str)],
        condition: impl Fn(&Self, usize, &str) -> bool,
    ) {
        let Some((ending, new)) = rules.iter().find(|(ending, _)| self.ends_with(ending)) else {
            return;
        };
        if condition(self, self.before(ending), ending) {
            self.replace(ending, new);
        }
    }

    fn step_1a(&mut self) {
        if self.ends_with("ies") && self.0.len() == 4 {
            return self.replace("ies", "ie");
        }
        let rules = [("sses", "ss"), ("ies", "i"), ("ss", "ss"), ("s", "")];
        self.first_rule(&rules, |_, _, _| true);
    }

    fn step_1b(&mut self) {
        if self.ends_with("ied") {
            let new = if self.0.len() == 4 { "ie" } else { "i" };
            return self.replace("ied", new);
        }
        if self.ends_with("eed") {
            if self.measure(self.before("eed")) > 0 {
                self.replace("eed", "ee");
            }
            return;
        }
        let Some(ending) = ["ed", "ing"]
            .into_iter()
            .find(|ending| self.ends_with(ending) && self.has_vowel(self.before(ending)))
        else {
            return;
        };
        self.replace(ending, "");
        if ["at", "bl", "iz"].iter().any(|ending| self.ends_with(ending)) {
            self.0.push(b'e');
        } else if self.ends_in_double_consonant() {
            if !matches!(self.0.last(), Some(b'l' | b's' | b'z')) {
                self.0.pop();
            }
        } else if self.measure(self.0.len()) == 1 && self.ends_in_short_syllable(self.0.len()) {
            self.0.push(b'e');
        }
    }

    fn step_1c(&mut self) {
        let stem = self.0.len() - 1;
        if self.ends_with("y") && stem > 1 && self.is_consonant(stem - 1) {
            self.replace("y", "i");
        }
    }

    fn step_2(&mut self) {
        // `alli` is taken up once more, as what is left may have another of these endings.
        if self.ends_with("alli") && self.measure(self.before("alli")) > 0 {
            self.replace("alli", "al");
            return self.step_2();
        }
        let rules = [
            ("ational", "ate"),
            ("tional", "tion"),
            ("enci", "ence"),
            ("anci", "ance"),
            ("izer", "ize"),
            ("bli", "ble"),
            ("alli", "al"),
            ("entli", "ent"),
            ("eli", "e"),
            ("ousli", "ous"),
            ("ization", "ize"),
            ("ation", "ate"),
            ("ator", "ate"),
            ("alism", "al"),
            ("iveness", "ive"),
            ("fulness", "ful"),
            ("ousness", "ous"),
            ("aliti", "al"),
            ("iviti", "ive"),
            ("biliti", "ble"),
            ("fulli", "ful"),
            ("logi", "log"),
        ];
        self.first_rule(&rules, |word, stem, ending| {
            // Of `logi`, the l belongs to the stem.
            word.measure(if ending == "logi" { stem + 1 } else { stem }) > 0
        });
    }

    fn step_3(&mut self) {
        let rules = [
            ("icate", "ic"),
            ("ative", ""),
            ("alize", "al"),
            ("iciti", "ic"),
            ("ical", "ic"),
            ("ful", ""),
            ("ness", ""),
        ];
        self.first_rule(&rules, |word, stem, _| word.measure(stem) > 0);
    }

    fn step_4(&mut self) {
        let rules = [
            "al", "ance", "ence", "er", "ic", "able", "ible", "ant", "ement", "ment", "ent", "ion",
            "ou", "ism", "ate", "iti", "ous", "ive", "ize",
        ]
        .map(|ending| (ending, ""));
        self.first_rule(&rules, |word, stem, ending| {
            let fits = ending != "ion" || matches!(word.0[..stem].last(), Some(b's' | b't'));
            fits && word.measure(stem) > 1
        });
    }

    fn step_5(&mut self) {
        if self.ends_with("e") {
            let stem = self.before("e");
            let measure = self.measure(stem);
            if measure > 1 || (measure == 1 && !self.ends_in_short_syllable(stem)) {
                self.0.pop();
            }
        }
        if self.ends_with("ll") && self.measure(self.0.len() - 1) > 1 {
            self.0.pop();
        }
    }
}
