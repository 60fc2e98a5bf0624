"""How do people and programs come in?"""
